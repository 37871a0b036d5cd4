"""Every method in one batch: what each request gets is what it gets alone, base rows stay the base's, and a program that was evicted and
admitted again is the same program."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tests.parity
from server.engine.types import BASE, ProgramRef, Request
from tests.conftest import TinyModels
from tests.harness import Result, greedy, load_base_for_lowering, lower_directory, make_engine, run
from tests.parity.cases import Case, make_checkpoint

TOLERANCE = 1e-5
PROMPTS = ([9, 200, 31], [(7 * index) % 250 + 5 for index in range(37)])


def all_cases(family: str) -> Iterator[Case]:
    """The first case of every peft_type in every parity test of this folder."""
    seen = set()
    for info in pkgutil.iter_modules(tests.parity.__path__):
        if not info.name.startswith("test_") or info.name == "test_mixed":
            continue
        for case in getattr(importlib.import_module(f"tests.parity.{info.name}"), "CASES", ()):
            if isinstance(case, Case) and family in case.families:
                kind = case.config(family).peft_type
                if kind not in seen:
                    seen.add(kind)
                    yield case


def requests(programs: dict[str, ProgramRef]) -> list[Request]:
    return [
        greedy(f"{name}-{index}", prompt, program, tokens=6)
        for name, program in programs.items()
        for index, prompt in enumerate(PROMPTS)
    ]


def same(first: Result, second: Result, name: str) -> None:
    assert first.error is None, (name, first.error)
    assert second.error is None, (name, second.error)
    assert first.tokens == second.tokens, name
    scale = max(1.0, float(torch.stack(first.logits).abs().max()))
    assert float((torch.stack(first.logits) - torch.stack(second.logits)).abs().max()) <= TOLERANCE * scale, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_all_methods_packed_equal_each_alone(family: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models(family)
    spec = load_base_for_lowering(base)
    programs = {
        case.name: lower_directory(make_checkpoint(case, family, base, tmp_path / case.name), spec, case.name)
        for case in all_cases(family)
    }
    assert len(programs) >= 12
    asked = requests({**programs, "base": BASE})
    sizes = {"bank_bytes": 64 << 20, "kv_cache_bytes": 16 << 20, "max_running": 128, "max_batch_tokens": 512}
    engine = make_engine(base, **sizes)
    alone = {}
    for request in asked:
        alone |= run(engine, [request])
    engine.close()
    engine = make_engine(base, prefix_caching=False, **sizes)
    packed = run(engine, asked)
    assert engine.stats().counters["steps"] < 20, "the requests did not share steps"
    for name in programs:
        engine.drop_program(name)
    assert engine.bank.num_slots_used == 0
    again = run(engine, asked[::-1])
    engine.close()
    for request in asked:
        same(alone[request.request_id], packed[request.request_id], request.request_id)
        same(packed[request.request_id], again[request.request_id], request.request_id)
