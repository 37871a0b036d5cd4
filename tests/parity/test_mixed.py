"""Every method in one batch: what each request gets is what it gets alone, base rows stay the base's, and a program that was evicted and
admitted again is the same program."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tests.parity
from server.engine.types import BASE, ProgramRef, Request
from tests.conftest import TinyModels
from tests.harness import Result, greedy, load_base_for_lowering, lower_directory, make_engine, run
from tests.parity.cases import Case, make_checkpoint

# PEFT warns of its own defaults, which are what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
TOLERANCES = {"float32": 1e-5, "float64": 1e-10}
"""Relative to the largest logit where that is above 1: products of one row and of many differ in their last bits."""
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


def same(first: Result, second: Result, name: str, tolerance: float) -> None:
    assert first.error is None, (name, first.error)
    assert second.error is None, (name, second.error)
    assert first.tokens == second.tokens, name
    scale = max(1.0, float(torch.stack(first.logits).abs().max()))
    assert float((torch.stack(first.logits) - torch.stack(second.logits)).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize(
    ("family", "dtype"), [("llama", "float32"), ("gpt2", "float32"), ("qwen2", "float32"), ("llama", "float64")]
)
def test_all_methods_packed_equal_each_alone(family: str, dtype: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models(family)
    spec = load_base_for_lowering(base, dtype)
    programs = {}
    for case in all_cases(family):
        # Half as wild as in the comparisons with PEFT, where a few methods amplify rounding a hundredfold.
        gentle = replace(case, scale=case.scale / 2)
        programs[case.name] = lower_directory(make_checkpoint(gentle, family, base, tmp_path / case.name), spec, case.name)
    assert len(programs) >= 12
    asked = requests({**programs, "base": BASE})
    sizes = {"bank_bytes": 64 << 20, "kv_cache_bytes": 16 << 20, "max_running": 128, "max_batch_tokens": 512}
    engine = make_engine(base, dtype, **sizes)
    alone = {}
    for request in asked:
        alone |= run(engine, [request])
    engine.close()
    engine = make_engine(base, dtype, prefix_caching=False, **sizes)
    packed = run(engine, asked)
    assert engine.stats().counters["steps"] < 20, "the requests did not share steps"
    for name in programs:
        engine.drop_program(name)
    assert engine.bank.num_slots_used == 0
    again = run(engine, asked[::-1])
    engine.close()
    for request in asked:
        same(alone[request.request_id], packed[request.request_id], request.request_id, TOLERANCES[dtype])
        same(packed[request.request_id], again[request.request_id], request.request_id, TOLERANCES[dtype])
