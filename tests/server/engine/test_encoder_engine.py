"""The encoders' engine: equal to transformers, alone equals packed, prologues, refusals, fairness, and failing alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from server.adapters.ir import LinearEdit, NormEdit, Program, Prologue
from server.adapters.program_file import write_program
from server.engine.types import BASE, ProgramRef, Task
from tests.conftest import TinyModels
from tests.harness import ask, greedy, make_encoder, run
from tests.server.engine.test_tasks import POOLINGS, expected_rows, make_probe
from tests.tiny import ENCODERS

PROMPTS = [[1, 9, 200, 31, 2], [1, 40, 2], [1, 50, 2], [1, *((7 * index) % 250 + 5 for index in range(70)), 2]]


def written(program: Program, directory: Path, name: str) -> ProgramRef:
    path = directory / f"{name}.safetensors"
    write_program(path, program, program_id=name, facts={})
    return ProgramRef(name, str(path))


@pytest.mark.parametrize("family", ENCODERS)
def test_base_vectors_equal_transformers(family: str, tiny_models: TinyModels) -> None:
    base = tiny_models(family)
    engine = make_encoder(base, "float64")
    results = run(engine, [ask(str(index), prompt, task=Task.EMBED) for index, prompt in enumerate(PROMPTS)])
    assert engine.stats().counters["steps"] == 1
    engine.close()
    for index, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(results[str(index)].rows, expected_rows(base, prompt, "mean", None), atol=1e-10, rtol=0)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_probes(pooling: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("bert")
    probe = make_probe(base, tmp_path / "probe", dtype="float64", pooling=pooling, multi_label=True)
    engine = make_encoder(base, "float64")
    result = run(engine, [ask("a", PROMPTS[0], probe)])["a"]
    engine.close()
    assert result.result is not None
    assert result.result.multi_label
    torch.testing.assert_close(result.rows, expected_rows(base, PROMPTS[0], pooling, tmp_path / "probe"), atol=1e-10, rtol=0)


def random_programs(directory: Path, dtype: torch.dtype) -> list[ProgramRef]:
    """Edits of several kinds, K/V and virtual tokens on the tiny BERT."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) * 0.3

    query, norm = "encoder.layer.1.attention.self.query", "encoder.layer.0.output.LayerNorm"
    edits = Program()
    edits.add(query, LinearEdit(down=random(3, 32), up=random(3, 32)))
    edits.add(norm, NormEdit(weight=random(32), bias=random(32)))
    kv = Program(prologue=Prologue(kv=random(2, 2, 4, 3, 8)))
    tokens = Program(prologue=Prologue(tokens=random(2, 32), tokens_site="embeddings.word_embeddings"))
    after = Program(prologue=Prologue(tokens=random(2, 32), tokens_site="embeddings.LayerNorm", shifts=False, after_first=True))
    named = {"edits": edits, "kv": kv, "tokens": tokens, "after": after}
    return [written(program, directory, name) for name, program in named.items()]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_alone_equals_packed(dtype: str, tolerance: float, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("bert")
    programs = [BASE, *random_programs(tmp_path, getattr(torch, dtype))]
    requests = [
        ask(f"{program.program_id}-{index}", prompt, program, task=Task.EMBED)
        for program in programs
        for index, prompt in enumerate(PROMPTS)
    ]
    engine = make_encoder(base, dtype)
    packed = run(engine, requests)
    assert engine.stats().counters["steps"] <= 2
    for request in requests:
        alone = run(engine, [request])[request.request_id]
        assert float((alone.rows - packed[request.request_id].rows).abs().max()) <= tolerance
    for index in range(len(PROMPTS)):
        rows = [packed[f"{program.program_id}-{index}"].rows for program in programs]
        assert all(float((rows[0] - other).abs().max()) > 1e-3 for other in rows[1:])
    engine.close()


@torch.inference_mode()
def test_virtual_tokens_after_the_embedding_norm(tiny_models: TinyModels, tmp_path: Path) -> None:
    """By hand: rows put in between the first token and the others, with no positions of their own."""
    base = tiny_models("bert")
    after = random_programs(tmp_path, torch.float64)[-1]
    engine = make_encoder(base, "float64")
    found = run(engine, [ask("a", PROMPTS[0], after, task=Task.EMBED)])["a"].rows
    resident = engine.bank.find("after")
    assert resident is not None
    model = AutoModel.from_pretrained(base, dtype=torch.float64).eval()
    embedded = model.embeddings(input_ids=torch.tensor([PROMPTS[0]]))
    hidden = torch.cat([embedded[:, :1], resident.extras["prologue.tokens"][None], embedded[:, 1:]], dim=1)
    rows = model.encoder(hidden).last_hidden_state[0]
    torch.testing.assert_close(found[0], torch.nn.functional.normalize(rows.mean(0), dim=0), atol=1e-10, rtol=0)
    engine.close()


def test_refusals(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("bert")
    engine = make_encoder(base)
    kv = random_programs(tmp_path, torch.float32)[1]
    requests = [
        greedy("generate", [1, 2]),
        ask("no head", [1, 2]),
        ask("long", [5] * 513, task=Task.EMBED),
        ask("fits", [5] * 512, task=Task.EMBED),
        ask("long with prologue", [5] * 510, kv, task=Task.EMBED),
        ask("vocabulary", [5, 10**6], task=Task.EMBED),
        ask("empty", [], task=Task.EMBED),
    ]
    results = run(engine, requests)
    assert engine.stats().slots_pinned == 0
    engine.close()
    codes = {name: result.error.code if result.error else None for name, result in results.items()}
    assert codes == {
        "generate": "task_not_served",
        "no head": "no_task_head",
        "long": "prompt_too_long",
        "fits": None,
        "long with prologue": "prompt_too_long",
        "vocabulary": "invalid_token_id",
        "empty": "empty_prompt",
    }


def test_a_step_holds_the_token_budget_and_tenants_take_turns(tiny_models: TinyModels) -> None:
    engine = make_encoder(tiny_models("bert"), max_batch_tokens=10)
    busy = [ask(f"busy{index}", [5] * 5, task=Task.EMBED) for index in range(6)]
    busy = [replace(item, tenant="busy") for item in busy]
    for request in [*busy, ask("other", [5] * 5, task=Task.EMBED)]:
        engine.add(request)
    first = {output.request_id for output in engine.step()}
    assert first == {"busy0", "other"}
    engine.add(ask("whole", [5] * 30, task=Task.EMBED))
    engine.abort("busy5")
    ended = [output.request_id for _ in range(6) for output in engine.step()]
    assert sorted(ended) == ["busy1", "busy2", "busy3", "busy4", "busy5", "whole"]
    assert not engine.has_unfinished
    engine.close()


def test_what_overflows_fails_alone(tiny_models: TinyModels, tmp_path: Path) -> None:
    hot = Program()
    hot.add("encoder.layer.0.output.LayerNorm", NormEdit(weight=torch.full((32,), 3e38), bias=torch.zeros(32)))
    engine = make_encoder(tiny_models("bert"))
    results = run(
        engine, [ask("hot", PROMPTS[0], written(hot, tmp_path, "hot"), task=Task.EMBED), ask("ok", PROMPTS[0], task=Task.EMBED)]
    )
    engine.close()
    assert results["hot"].error is not None
    assert results["hot"].error.code == "non_finite_output"
    assert results["ok"].error is None
