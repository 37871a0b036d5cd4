"""Prologues in the engine: equal to the base model with a filled cache, shared by block, and nobody's tokens otherwise."""

from __future__ import annotations

import time
from collections.abc import Sequence as Ids
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from server.adapters.base_spec import BaseSpec
from server.adapters.ir import LinearEdit, Program, Prologue
from server.adapters.program_file import write_program
from server.engine.batch import Batch
from server.engine.engine import Engine
from server.engine.runner import StepResult
from server.engine.types import BASE, FinishReason, ProgramRef, Request, RequestOutput, SamplingParams
from tests.conftest import TinyModels
from tests.harness import Result, greedy, load_base_for_lowering, make_engine, run

TOLERANCE = 1e-9
LENGTHS = {"kv-5": (5, 0), "kv-20": (20, 0), "kv-16": (16, 0), "tokens-20": (0, 20), "tokens-1": (0, 1), "both": (19, 14)}


def prompt(length: int, salt: int = 3) -> list[int]:
    return [(salt * 31 + 7 * index * index + index) % 250 + 5 for index in range(length)]


def make_program(spec: BaseSpec, num_kv: int, num_tokens: int, *, shifts: bool = True, edited: bool = False) -> Program:
    """A program of random pseudo-tokens, with ``edited`` beside a low-rank edit of every linear."""
    generator = torch.Generator().manual_seed(num_kv * 100 + num_tokens)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    kv = noise(spec.num_layers, 2, spec.num_kv_heads, num_kv, spec.head_dim) if num_kv else None
    tokens = noise(num_tokens, spec.hidden_size) if num_tokens else None
    program = Program(prologue=Prologue(kv, tokens, spec.embedding, shifts=shifts))
    for site in spec.sites if edited else ():
        if site.kind == "linear":
            program.add(site.name, LinearEdit(down=noise(2, site.in_features) / 8, up=noise(2, site.out_features) / 8))
    return program


def write(program: Program, name: str, directory: Path) -> ProgramRef:
    path = directory / f"{name}.safetensors"
    write_program(path, program, program_id=name, facts={})
    return ProgramRef(name, str(path))


def make_refs(base: Path, directory: Path) -> dict[str, ProgramRef]:
    spec = load_base_for_lowering(base, "float64").spec
    refs = {name: write(make_program(spec, *lengths), name, directory) for name, lengths in LENGTHS.items()}
    return {**refs, "edited": write(make_program(spec, 9, 12, edited=True), "edited", directory)}


@torch.inference_mode()
def expected_logits(base: Path, program: Program, ids: Ids[int], count: int) -> Tensor:
    """The last ``count`` rows of logits that Hugging Face's own cache and embeddings give for the prologue in front of ``ids``."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).eval()
    prologue = program.prologue
    embedded = model.get_input_embeddings()(torch.tensor(ids))
    rows = embedded if prologue.tokens is None else torch.cat([prologue.tokens, embedded])
    cache = DynamicCache() if prologue.kv is None else DynamicCache([(key[None], value[None]) for key, value in prologue.kv])
    shift = len(prologue) if prologue.shifts else 0
    positions = [*range(prologue.num_kv, len(prologue)), *range(shift, shift + len(ids))]
    output = model(inputs_embeds=rows[None], position_ids=torch.tensor([positions]), past_key_values=cache, use_cache=True)
    logits: Tensor = output.logits[0, -count:]
    return logits


def same(alone: Result, packed: Result) -> None:
    assert packed.error is None
    assert packed.tokens == alone.tokens
    assert float((torch.stack(packed.logits) - torch.stack(alone.logits)).abs().max()) <= TOLERANCE


def record(engine: Engine) -> list[Batch]:
    """Every batch that the engine will run."""
    batches: list[Batch] = []
    inner = engine._runner.run

    def run_recorded(batch: Batch) -> StepResult:
        batches.append(batch)
        return inner(batch)

    engine._runner.run = run_recorded  # type: ignore[method-assign]
    return batches


def finish(engine: Engine) -> list[RequestOutput]:
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    return outputs


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("budget", [64, 7])
def test_equals_the_base_with_a_filled_cache(family: str, budget: int, tiny_models: TinyModels, tmp_path: Path) -> None:
    """Also in chunks that end within the prologue, behind a sliding window, and with real tokens that start at position 0."""
    base = tiny_models(family)
    spec = load_base_for_lowering(base, "float64").spec
    programs = {name: make_program(spec, *lengths) for name, lengths in LENGTHS.items()}
    programs["unshifted"] = make_program(spec, 18, 0, shifts=False)
    refs = {name: write(program, name, tmp_path) for name, program in programs.items()}
    engine = make_engine(base, "float64", max_batch_tokens=budget)
    requests = [greedy(f"{name}:{length}", prompt(length), ref) for name, ref in refs.items() for length in (1, 33)]
    results = run(engine, requests)
    engine.close()
    for request in requests:
        result = results[request.request_id]
        ids = [*request.prompt_token_ids, *result.tokens][:-1]
        expected = expected_logits(base, programs[request.request_id.partition(":")[0]], ids, 8)
        assert float((torch.stack(result.logits) - expected).abs().max()) <= TOLERANCE, request.request_id
        assert result.tokens == expected.argmax(-1).tolist()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_packed_equals_alone(family: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models(family)
    refs = {**make_refs(base, tmp_path), "base": BASE}
    requests = [greedy(f"{name}-{length}", prompt(length, 9), ref) for name, ref in refs.items() for length in (1, 3, 37)]
    engine = make_engine(base, "float64")
    alone: dict[str, Result] = {}
    for request in requests:
        alone |= run(engine, [request])
    engine.close()
    engine = make_engine(base, "float64", prefix_caching=False, max_batch_tokens=19)
    packed = run(engine, [greedy("long", prompt(300, 77), refs["both"], tokens=40), *requests])
    engine.close()
    for request in requests:
        same(alone[request.request_id], packed[request.request_id])


def test_a_prefix_that_overflows_fails_alone_and_is_never_shared(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    refs = make_refs(base, tmp_path)
    program = make_program(load_base_for_lowering(base, "float64").spec, 20, 0)
    assert program.prologue.kv is not None
    program.prologue.kv *= 1e308
    hostile = write(program, "hostile", tmp_path)
    good = [greedy(name, prompt(5), ref) for name, ref in refs.items()]
    engine = make_engine(base, "float64")
    expected = run(engine, good)
    engine.close()
    engine = make_engine(base, "float64")
    found = run(engine, [*(greedy(f"bad-{index}", prompt(5), hostile, tenant="bad") for index in range(3)), *good])
    for index in range(3):
        error = found[f"bad-{index}"].error
        assert error is not None
        assert error.code == "non_finite_output"
    for name, result in expected.items():
        same(result, found[name])
    cached = engine.blocks.num_cached
    run(engine, [greedy("bad", prompt(5), hostile, tenant="bad")])
    assert engine.blocks.num_cached == cached
    engine.close()


def test_preemption_copies_and_computes_again(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    refs = make_refs(base, tmp_path)
    requests = [greedy(f"{index}", prompt(30, index), ref, tokens=40) for index, ref in enumerate(refs.values())]
    roomy = make_engine(base, "float64")
    tight = make_engine(base, "float64", kv_cache_bytes=15 * 2 * 2 * 2 * 16 * 8 * 8, max_model_len=128)
    expected, found = run(roomy, requests), run(tight, requests)
    assert tight.scheduler.num_preemptions
    assert tight.blocks.num_used == 0
    roomy.close()
    tight.close()
    for name, result in expected.items():
        same(result, found[name])


@pytest.mark.parametrize("name", ["kv-20", "tokens-20"])
def test_full_blocks_are_shared_and_the_tail_is_each_ones_own(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    ref = make_refs(base, tmp_path)[name]
    engine = make_engine(base, "float64")
    batches = record(engine)
    first = run(engine, [greedy("first", prompt(3, 1), ref, tenant="acme")])["first"]
    begun = len(batches)
    engine.add(greedy("second", prompt(3, 2), ref, tenant="acme", tokens=4))
    engine.add(greedy("third", prompt(3, 4), ref, tenant="acme", tokens=4))
    engine.add(greedy("other", prompt(3, 2), ref, tenant="other", tokens=4))
    engine.step()
    # One shared block and a second one of its own each; the other tenant shares nothing.
    assert engine.stats().kv_blocks_used == 1 + 2 + 2
    copied = [(copy.first, copy.end) for copy in batches[begun].copies]
    computed = [rows.offset for rows in batches[begun].virtual_rows]
    assert (copied, computed) == (([(16, 20), (16, 20), (0, 20)], []) if name == "kv-20" else ([], [16, 16, 0]))
    outputs = finish(engine)
    assert first.num_cached_tokens == 0
    assert {output.num_cached_tokens for output in outputs} == {0}
    # A repeated prompt shares its real tokens too, and only those are told.
    long = greedy("long", prompt(60), ref, tenant="acme")
    cold, warm = run(engine, [long])["long"], run(engine, [long])["long"]
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 4 * 16 - 20)
    same(cold, warm)
    engine.close()


def test_only_real_tokens_are_counted(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    refs = make_refs(base, tmp_path)
    engine = make_engine(base, "float64", max_batch_tokens=9)
    run(engine, [greedy(name, prompt(10), ref, tokens=3) for name, ref in refs.items()])
    assert engine.stats().counters["prompt_tokens"] == 10 * len(refs)
    assert engine.stats().counters["generated_tokens"] == 3 * len(refs)
    engine.close()


def test_tenants_pay_for_what_is_computed(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    refs = make_refs(base, tmp_path)
    engine = make_engine(base, "float64")
    for name in ("kv-20", "tokens-20"):
        engine.add(greedy(name, prompt(10), refs[name], tokens=1))
    while engine.scheduler.num_waiting < 2:
        time.sleep(0.001)
        engine._receive_loads()
    engine.step()
    assert engine.scheduler._waiting._served == {"kv-20": 10 + 2, "tokens-20": 30 + 2}
    engine.close()


@pytest.mark.parametrize("name", list(LENGTHS))
def test_prompt_logprobs_are_of_real_tokens(name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    program = make_program(load_base_for_lowering(base, "float64").spec, *LENGTHS[name])
    engine = make_engine(base, "float64", max_batch_tokens=11)
    ref = write(program, name, tmp_path)
    run(engine, [greedy("before", prompt(3), ref, tenant="acme")])
    ids = prompt(13)
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    engine.add(Request("x", tuple(ids), params, ref, "acme"))
    found = finish(engine)[0].prompt_logprobs
    engine.close()
    assert found is not None
    assert found[0] is None
    assert [item.token_id for item in found if item] == ids[1:]
    table = torch.log_softmax(expected_logits(base, program, ids, len(ids)), -1)
    for index, item in enumerate(found[1:]):
        assert item is not None
        assert abs(item.logprob - float(table[index, ids[index + 1]])) < TOLERANCE


def test_penalties_do_not_see_pseudo_tokens(tiny_models: TinyModels, tmp_path: Path) -> None:
    """The id that stands for pseudo-tokens must not count as seen: with everything else forbidden it is as likely as before."""
    base = tiny_models("llama")
    ref = make_refs(base, tmp_path)["tokens-20"]
    engine = make_engine(base, "float64")
    bias = tuple((token, -200.0) for token in range(2, load_base_for_lowering(base).spec.vocab_size))
    plain = run(engine, [greedy("x", prompt(4), ref, tokens=1, logit_bias=bias)])["x"]
    raw = plain.logits[0][:2]
    rival = ((0, 1e-6 - float(raw[0])), (1, -float(raw[1])))
    for penalties in ({}, {"repetition_penalty": 1e6}, {"presence_penalty": 2.0, "frequency_penalty": 2.0}):
        request = greedy("x", prompt(4), ref, tokens=1, logit_bias=(*rival, *bias), **penalties)
        assert run(engine, [request])["x"].tokens == [0]
    engine.close()


def test_abort_within_the_prologue_frees_everything(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    refs = make_refs(base, tmp_path)
    engine = make_engine(base, "float64", max_batch_tokens=6)
    run(engine, [greedy(f"warm-{name}", prompt(2), ref, tokens=1) for name, ref in refs.items()])
    for name, ref in refs.items():
        engine.add(greedy(name, prompt(20), ref))
    engine.step()
    assert engine.blocks.num_used
    for name in refs:
        engine.abort(name)
    ended = {output.request_id: output.finish_reason for output in finish(engine) if output.finish_reason}
    assert ended == dict.fromkeys(refs, FinishReason.ABORT)
    assert engine.blocks.num_used == 0
    engine.blocks.check_integrity()
    assert engine.stats().slots_pinned == 0
    engine.close()


def test_a_step_that_raises_copies_again_when_run_apart(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    refs = make_refs(base, tmp_path)
    requests = [greedy(name, prompt(6), ref) for name, ref in refs.items()]
    engine = make_engine(base, "float64")
    expected = run(engine, requests)
    engine.close()
    engine = make_engine(base, "float64")
    inner, bad = engine._runner.run, greedy("bad", prompt(5))

    def poisoned(batch: Batch) -> StepResult:
        result = inner(batch)
        if any(item.sequence.request.request_id == "bad" for item in batch.items):
            raise RuntimeError("planted")
        return result

    engine._runner.run = poisoned  # type: ignore[method-assign]
    found = run(engine, [*requests, bad])
    engine.close()
    assert found["bad"].error is not None
    for name, result in expected.items():
        same(result, found[name])


def test_what_does_not_fit_beside_the_prologue_is_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    refs = make_refs(base, tmp_path)
    engine = make_engine(base, "float64", max_model_len=48)
    cases = [greedy("fits", prompt(27), refs["kv-20"]), greedy("long", prompt(28), refs["tokens-20"])]
    results = run(engine, [*cases, greedy("nothing", prompt(20), refs["both"])])
    again = run(engine, [greedy("resident", prompt(40), refs["kv-20"])])["resident"]
    engine.close()
    assert (results["fits"].finish_reason, len(results["fits"].tokens)) == (FinishReason.LENGTH, 1)
    for result, virtual in ((results["long"], 20), (results["nothing"], 33), (again, 20)):
        assert result.error is not None
        assert result.error.code == "prompt_too_long"
        assert f"{virtual} virtual tokens" in result.error.message
