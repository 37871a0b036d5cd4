"""Every method in one batch: what each request gets is what it gets alone, base rows stay the base's, and a program that was evicted and
admitted again is the same program. On decoders they generate, on encoders they classify."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.adapters.kernels import NativeEdits, load_native
from server.engine.encoder_engine import EncoderEngine
from server.engine.engine import Engine
from server.engine.model import DTYPES
from server.engine.types import BASE, ProgramRef, Request, Task
from tests.conftest import TinyModels
from tests.harness import Result, ask, greedy, lower_directory, make_encoder, make_engine, run
from tests.kernels import KERNELS
from tests.parity.cases import make_checkpoint, one_of_each
from tests.parity.shared import lowering_base
from tests.tiny import ENCODERS

# PEFT warns of its own defaults, which are what is tested.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
TOLERANCES = {"float32": 1e-5, "float64": 1e-10}
"""Relative to the largest logit where that is above 1: products of one row and of many differ in their last bits."""
PROMPTS = ([9, 200, 31], [(7 * index) % 250 + 5 for index in range(37)])


def request(name: str, prompt: Sequence[int], program: ProgramRef, family: str) -> Request:
    if family not in ENCODERS:
        return greedy(name, prompt, program, tokens=4)
    # The base has no classifier.
    return ask(name, prompt, program, task=Task.EMBED if program is BASE else Task.CLASSIFY)


def engine_for(family: str, base: Path, dtype: str, kernel: NativeEdits | None = None) -> Engine | EncoderEngine:
    if family in ENCODERS:
        return make_encoder(base, dtype, kernel=kernel, bank_bytes=64 << 20)
    sizes = {"bank_bytes": 64 << 20, "kv_cache_bytes": 16 << 20, "max_running": 128, "max_batch_tokens": 512}
    return make_engine(base, dtype, kernel=kernel, prefix_caching=False, **sizes)


def numbers(result: Result, name: str) -> Tensor:
    """All that a request gave: its logits ``(n, vocab)`` or rows ``(n, width)``."""
    assert result.error is None, (name, result.error)
    return torch.stack(result.logits) if result.logits else result.rows


def same(first: Result, second: Result, name: str, tolerance: float) -> None:
    one, other = numbers(first, name), numbers(second, name)
    assert first.tokens == second.tokens, name
    assert float((one - other).abs().max()) <= tolerance * max(1.0, float(one.abs().max())), name


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", "float32"),
        ("gpt2", "float32"),
        ("qwen2", "float32"),
        ("bert", "float32"),
        ("llama", "float64"),
        ("bert", "float64"),
    ],
)
def test_all_methods_packed_equal_each_alone(family: str, dtype: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    # In fp32 the batch runs on the native kernel, and each alone on the reference.
    native = load_native(KERNELS, DTYPES[dtype], torch.device("cpu"))
    assert (native is not None) == (dtype == "float32")
    base, task = tiny_models(family), "SEQ_CLS" if family in ENCODERS else "CAUSAL_LM"
    programs = {}
    for case in one_of_each(family):
        # Half as wild as in the comparisons with PEFT, where a few methods amplify rounding a hundredfold.
        gentle = replace(case, scale=case.scale / 2)
        adapter = make_checkpoint(gentle, family, base, tmp_path / case.name, task=task)
        programs[case.name] = lower_directory(adapter, lowering_base(base, dtype), case.name)
    assert len(programs) >= 12
    asked = [
        request(f"{name}-{index}", prompt, program, family)
        for name, program in {**programs, "base": BASE}.items()
        for index, prompt in enumerate(PROMPTS)
    ]
    engine = engine_for(family, base, dtype)
    alone = {}
    for item in asked:
        alone |= run(engine, [item])
    engine.close()
    engine = engine_for(family, base, dtype, native)
    packed = run(engine, asked)
    assert engine.stats().counters["steps"] < 20, "the requests did not share steps"
    for name in programs:
        engine.drop_program(name)
    assert engine.bank.num_slots_used == 0
    again = run(engine, asked[::-1])
    engine.close()
    for item in asked:
        same(alone[item.request_id], packed[item.request_id], item.request_id, TOLERANCES[dtype])
        same(packed[item.request_id], again[item.request_id], item.request_id, TOLERANCES[dtype])
