"""Requests that make no token, on a decoder: they share steps with generation, survive cuts and preemption, and fail alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from server.engine.types import BASE, FinishReason, ProgramRef, Task
from tests.conftest import TinyModels
from tests.harness import ask, greedy, load_base_for_lowering, lower_directory, make_engine, run

LONG = [(11 * index) % 250 + 5 for index in range(50)]
POOLINGS = ("first", "last", "mean", "none")


def make_probe(base: Path, directory: Path, *, dtype: str = "float32", scale: float = 0.3, **config: Any) -> ProgramRef:
    """A probe with random weights, lowered: two layers and three labels."""
    torch.manual_seed(5)
    directory.mkdir(parents=True)
    settings = {"medley_type": "PROBE", "activation": "tanh", "labels": ["red", "green", "blue"], **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {"0.weight": torch.randn(8, 32), "0.bias": torch.randn(8), "1.weight": torch.randn(3, 8), "1.bias": torch.randn(3)}
    save_file({name: tensor * scale for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    return lower_directory(directory, load_base_for_lowering(base, dtype), f"probe-{directory.name}")


@torch.inference_mode()
def expected_rows(base: Path, prompt: list[int], pooling: str, probe: Path | None) -> torch.Tensor:
    """By the book: transformers' hidden states, pooled, then the two layers or unit length. fp64."""
    hidden = AutoModel.from_pretrained(base, dtype=torch.float64).eval()(input_ids=torch.tensor([prompt])).last_hidden_state[0]
    rows = {"first": hidden[:1], "last": hidden[-1:], "mean": hidden.mean(0, keepdim=True), "none": hidden}[pooling]
    if probe is None:
        return torch.nn.functional.normalize(rows, dim=-1)
    weights = {name: tensor.double() for name, tensor in load_file(probe / "adapter_model.safetensors").items()}
    return torch.tanh(rows @ weights["0.weight"].T + weights["0.bias"]) @ weights["1.weight"].T + weights["1.bias"]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_does_not_see_where_a_prompt_is_cut(pooling: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    program = make_probe(base, tmp_path / pooling, dtype="float64", pooling=pooling)
    engine = make_engine(base, "float64", max_batch_tokens=16)
    result = run(engine, [ask("a", LONG, program), greedy("g", LONG[:30], tokens=8)])["a"]
    assert engine.stats().counters["steps"] > 3
    engine.close()
    assert result.finish_reason is FinishReason.STOP
    assert result.tokens == []
    assert result.result is not None
    assert result.result.labels == ("red", "green", "blue")
    assert result.result.per_token == (pooling == "none")
    torch.testing.assert_close(result.rows, expected_rows(base, LONG, pooling, tmp_path / pooling), atol=1e-10, rtol=0)


def test_classifying_embedding_and_generating_share_a_step(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("qwen2")
    probe = make_probe(base, tmp_path / "probe", pooling="last")
    requests = [greedy("g", LONG[:9], tokens=1), ask("c", LONG[:12], probe), ask("e", LONG[:7], task=Task.EMBED)]
    engine = make_engine(base)
    packed = run(engine, requests)
    assert engine.stats().counters["steps"] == 1
    engine.close()
    for request in requests:
        engine = make_engine(base)
        alone = run(engine, [request])[request.request_id]
        engine.close()
        found = packed[request.request_id]
        if request.task is Task.GENERATE:
            assert found.tokens == alone.tokens
        else:
            assert float((found.rows - alone.rows).abs().max()) <= 1e-5
    torch.testing.assert_close(packed["e"].rows, expected_rows(base, LONG[:7], "last", None), atol=1e-5, rtol=0)


def test_only_the_last_row_may_come_after_cached_blocks(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    last, mean = (make_probe(base, tmp_path / pooling, pooling=pooling) for pooling in ("last", "mean"))
    engine = make_engine(base)
    for program, cached in ((last, 48), (mean, 0)):
        requests = [ask(name, LONG, program) for name in ("first", "again")]
        requests = [replace(item, tenant="t") for item in requests]
        first, again = (run(engine, [item])[item.request_id] for item in requests)
        torch.testing.assert_close(first.rows, again.rows, atol=1e-5, rtol=0)
        assert engine.stats().counters.get("cached_tokens", 0) == cached
        engine._counters["cached_tokens"] = 0
    engine.close()


def test_preemption_starts_the_pooling_again(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    program = make_probe(base, tmp_path / "mean", pooling="mean")
    # Five blocks: the generating request takes its second one while the other's prompt is under way.
    engine = make_engine(base, max_batch_tokens=18, kv_cache_bytes=6 * 4096)
    results = run(engine, [greedy("g", LONG[:16], tokens=30), ask("m", LONG, program)])
    assert engine.stats().counters["preemptions"] == 1
    engine.close()
    torch.testing.assert_close(results["m"].rows, expected_rows(base, LONG, "mean", tmp_path / "mean"), atol=1e-5, rtol=0)


def test_an_adapter_with_a_classifier_still_generates_as_the_base(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    engine = make_engine(base)
    results = run(engine, [greedy("p", LONG, make_probe(base, tmp_path / "p")), greedy("b", LONG)])
    engine.close()
    assert results["p"].tokens == results["b"].tokens


def test_refusals(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    engine = make_engine(base, max_model_len=40)
    results = run(
        engine, [ask("no head", LONG[:4]), ask("long", LONG, BASE, task=Task.EMBED), ask("fits", LONG[:40], task=Task.EMBED)]
    )
    engine.close()
    assert results["no head"].error is not None
    assert results["no head"].error.code == "no_task_head"
    assert results["long"].error is not None
    assert results["long"].error.code == "prompt_too_long"
    assert results["fits"].error is None


def test_a_classifier_that_overflows_fails_alone(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    hot = make_probe(base, tmp_path / "hot", scale=1e38, activation="linear")
    engine = make_engine(base)
    results = run(
        engine, [ask("hot", LONG, hot), ask("ok", LONG, make_probe(base, tmp_path / "ok")), greedy("g", LONG, tokens=2)]
    )
    engine.close()
    assert results["hot"].error is not None
    assert results["hot"].error.code == "non_finite_output"
    assert results["ok"].error is None
    assert len(results["g"].tokens) == 2
