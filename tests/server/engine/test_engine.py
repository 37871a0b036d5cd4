"""The engine as a whole: refusals, ends, limits, sampling, and faults that hit one request only."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from server.engine.batch import Batch
from server.engine.engine import Engine
from server.engine.runner import StepResult
from server.engine.types import FinishReason, ProgramRef, Request, SamplingParams
from tests.conftest import TinyModels
from tests.harness import greedy, make_engine, run
from tests.server.engine.stepping import Clock
from tests.tiny import VOCAB

PROMPT = [9, 200, 31, 77]


@pytest.fixture
def engine(tiny_models: TinyModels) -> Engine:
    return make_engine(tiny_models("llama"))


def ask(engine: Engine, **params: object) -> list[int]:
    request = Request("x", tuple(PROMPT), SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **params}))  # type: ignore[arg-type]
    result = run(engine, [request])["x"]
    assert result.error is None
    return result.tokens


@pytest.mark.parametrize(
    ("prompt", "code"),
    [([], "empty_prompt"), ([5] * 512, "prompt_too_long"), ([VOCAB], "invalid_token_id"), ([-1], "invalid_token_id")],
)
def test_what_cannot_run_ends_with_an_error(engine: Engine, prompt: list[int], code: str) -> None:
    result = run(engine, [greedy("x", prompt)])["x"]
    assert result.error is not None
    assert (result.finish_reason, result.error.code) == (FinishReason.ERROR, code)


def test_a_running_id_is_refused_again(engine: Engine) -> None:
    engine.add(greedy("x", PROMPT))
    engine.add(greedy("x", PROMPT))
    assert [output.error.code for output in engine.step() if output.error] == ["duplicate_request"]


def test_ends(engine: Engine) -> None:
    plain = ask(engine, temperature=0)
    stopped = run(
        engine,
        [Request("x", tuple(PROMPT), SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, stop_token_ids=(plain[3],)))],
    )["x"]
    assert stopped.tokens == plain[: plain.index(plain[3])]
    assert stopped.finish_reason is FinishReason.STOP
    long = run(engine, [greedy("x", [5] * 500, tokens=100)])["x"]
    assert (len(long.tokens), long.finish_reason) == (12, FinishReason.LENGTH)


def test_eos_ends_unless_ignored(engine: Engine) -> None:
    bias = ((2, 100.0),)
    result = run(engine, [Request("x", tuple(PROMPT), SamplingParams(max_tokens=5, temperature=0, logit_bias=bias))])["x"]
    assert (result.tokens, result.finish_reason) == ([], FinishReason.STOP)
    kept = run(engine, [Request("x", tuple(PROMPT), SamplingParams(max_tokens=5, temperature=0, logit_bias=bias, min_tokens=3))])[
        "x"
    ]
    assert len(kept.tokens) == 3
    assert 2 not in kept.tokens
    assert ask(engine, temperature=0, logit_bias=bias) == [2] * 12


def test_abort_frees_everything_at_once(engine: Engine) -> None:
    for index in range(4):
        engine.add(greedy(str(index), PROMPT, tokens=100))
    engine.step()
    for index in range(4):
        engine.abort(str(index))
    engine.abort("unknown")
    ended = {output.request_id: output.finish_reason for output in engine.step() if output.finish_reason}
    assert ended == dict.fromkeys("0123", FinishReason.ABORT)
    assert engine.blocks.num_used == 0
    assert not engine.has_unfinished


def test_seeds_decide_alone_and_packed(engine: Engine) -> None:
    alone = ask(engine, seed=5, temperature=1.3)
    assert ask(engine, seed=6, temperature=1.3) != alone
    crowd = [
        Request(str(index), (5 + index,), SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)) for index in range(6)
    ]
    same = Request("same", tuple(PROMPT), SamplingParams(max_tokens=12, temperature=1.3, seed=5, ignore_eos=True))
    assert run(engine, [*crowd, same])["same"].tokens == alone


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-6}])
def test_limits_of_sampling_are_greedy(engine: Engine, params: dict[str, float]) -> None:
    assert ask(engine, **{"temperature": 1.0, "seed": 1, **params}) == ask(engine, temperature=0)


def test_sampling_follows_the_distribution(engine: Engine) -> None:
    reference = run(engine, [greedy("x", PROMPT, tokens=1)])["x"].logits[0]
    probabilities = torch.softmax(reference, -1)
    draws: Counter[int] = Counter()
    for seed in range(300):
        draws.update(run(engine, [Request("x", tuple(PROMPT), SamplingParams(max_tokens=1, seed=seed, top_k=3))])["x"].tokens)
    best = probabilities.topk(3)
    assert set(draws) <= set(best.indices.tolist())
    share = best.values / best.values.sum()
    for token, expected in zip(best.indices.tolist(), share.tolist(), strict=True):
        assert abs(draws[token] / 300 - expected) < 0.12


def test_penalties_and_bias(engine: Engine) -> None:
    plain = ask(engine, temperature=0)
    assert ask(engine, temperature=0, logit_bias=((plain[0], -100.0),))[0] != plain[0]
    spread = ask(engine, temperature=0, frequency_penalty=2.0, presence_penalty=2.0)
    assert len(set(spread)) >= len(set(plain))
    assert len(set(ask(engine, temperature=0, repetition_penalty=50.0))) == 12


def test_logprobs_are_the_models_own(tiny_models: TinyModels) -> None:
    engine = make_engine(tiny_models("llama"), max_batch_tokens=3)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    engine.add(Request("x", tuple(PROMPT), params))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    first = outputs[0].prompt_logprobs
    assert first is not None
    assert first[0] is None
    assert [item.token_id for item in first if item] == PROMPT[1:]
    whole = run(engine, [greedy(f"{end}", PROMPT[:end], tokens=1) for end in (1, 2, 3)])
    for end in (1, 2, 3):
        expected = torch.log_softmax(whole[str(end)].logits[0], -1)[PROMPT[end]]
        assert abs(first[end].logprob - float(expected)) < 1e-4  # type: ignore[union-attr]
    for output in outputs:
        chosen = output.logprobs[0]
        assert chosen.token_id == output.token_ids[0] == chosen.top[0][0]
        assert len(chosen.top) == 2


def test_a_program_that_cannot_be_loaded_fails_its_requests_only(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    broken = [
        greedy(f"broken-{name}", PROMPT, ProgramRef(name, str(tmp_path / f"{name}.safetensors"))) for name in ("broken", "absent")
    ]
    results = run(engine, [*broken, greedy("base", PROMPT)])
    assert [results[f"broken-{name}"].error.code for name in ("broken", "absent")] == ["adapter_load_failed"] * 2  # type: ignore[union-attr]
    assert len(results["base"].tokens) == 8


def test_a_step_that_raises_fails_the_row_that_raises_alone(engine: Engine) -> None:
    expected = run(engine, [greedy("good", PROMPT)])["good"]
    inner = engine._runner.run

    def poisoned(batch: Batch) -> StepResult:
        if any(item.sequence.request.request_id == "bad" for item in batch.items):
            raise RuntimeError("planted")
        return inner(batch)

    engine._runner.run = poisoned  # type: ignore[method-assign]
    results = run(engine, [greedy("good", PROMPT), greedy("bad", PROMPT)])
    assert results["bad"].error is not None
    assert results["bad"].error.code == "internal_error"
    assert results["good"].tokens == expected.tokens


def test_causality(engine: Engine) -> None:
    """The mask is ours: a later token must not change what an earlier position sees."""
    prompts = {name: [*PROMPT, *tail] for name, tail in (("one", [50, 60]), ("two", [70, 80]))}
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, prompt_logprobs=5)
    tables = {}
    for name, prompt in prompts.items():
        engine.add(Request(name, tuple(prompt), params))
        outputs = []
        while engine.has_unfinished:
            outputs += engine.step()
        tables[name] = outputs[0].prompt_logprobs
    assert tables["one"][: len(PROMPT)] == tables["two"][: len(PROMPT)]  # type: ignore[index]


def test_tokens_that_nobody_reads_as_they_come_are_told_together(engine: Engine) -> None:
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1)
    engine.add(Request("read", tuple(PROMPT), params))
    engine.add(Request("whole", tuple(PROMPT), params, streams=False))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    read, whole = ([output for output in outputs if output.request_id == name] for name in ("read", "whole"))
    assert [len(output.token_ids) for output in read] == [1] * 12
    assert [len(output.token_ids) for output in whole] == [1, 11]
    assert [output.finish_reason for output in whole] == [None, FinishReason.LENGTH]
    for name in ("token_ids", "logprobs"):
        joined = [sum((getattr(output, name) for output in found), ()) for found in (read, whole)]
        assert joined[0] == joined[1]


def test_a_stop_token_ends_what_is_told_together(engine: Engine) -> None:
    plain = ask(engine, temperature=0)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=0, stop_token_ids=(plain[-1],))
    engine.add(Request("x", tuple(PROMPT), params, streams=False))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    last, end = outputs[-1], plain.index(plain[-1])
    assert sum((output.token_ids for output in outputs), ()) == tuple(plain[:end])
    assert len(last.logprobs) == len(last.token_ids)
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, plain[-1])
    assert last.stop_logprob is not None


def test_prompts_beside_a_stream_are_cut_as_the_steps_time_says(tiny_models: TinyModels) -> None:
    """A machine that takes a 64th of a second for a token, told to keep steps within 20 of them; what is computed does not depend on the cuts."""
    clock, counts = Clock(), []

    def run_slowly(batch: Batch) -> StepResult:
        counts.append([item.count for item in batch.items])
        clock.now += sum(counts[-1]) / 64
        return compute(batch)

    engine = make_engine(tiny_models("llama"), "float64", max_batch_tokens=128, step_target_s=20 / 64, clock=clock)
    compute = engine._runner.run
    engine._runner.run = run_slowly  # type: ignore[method-assign]
    requests = [greedy("stream", PROMPT, tokens=12), greedy("long", [5, 6, 7, 8] * 20, tokens=2)]
    paced = run_joining(engine, requests)
    assert counts[:7] == [[4], [1, 19], [1, 19], [1, 19], [1, 19], [1, 4], [1, 1]]
    whole = run(make_engine(tiny_models("llama"), "float64", max_batch_tokens=128), requests)
    assert paced == {name: result.tokens for name, result in whole.items()}


def run_joining(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    """Tokens of requests that come a step after one another."""
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    waiting = list(requests)
    while waiting or engine.has_unfinished:
        if waiting:
            engine.add(waiting.pop(0))
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    return tokens
