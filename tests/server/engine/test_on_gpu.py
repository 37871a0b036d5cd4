"""An engine on the Triton kernels gives what an engine on the reference does: in the interpreter everywhere, and on a GPU where there is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from server.adapters.kernels import lowrank_reference, triton_slots
from server.adapters.kernels.triton_slots import TRITON
from server.engine.kernels import GatheredAttention, choice
from server.engine.kernels.choice import choose_kernels
from server.engine.kernels.graph import CudaGraphs
from server.engine.kernels.triton_attention import attention_triton
from server.engine.types import BASE, Request
from tests.conftest import TinyModels
from tests.harness import Result, greedy, load_base_for_lowering, lower_directory, make_engine, run
from tests.parity.variants import VARIANTS, make_adapter

# The interpreter computes with NumPy, which warns of what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")

NAMES = ("patterns", "dora")


def requests(base: Path, directory: Path, tokens: int = 1) -> list[Request]:
    """Requests of two programs and the base: one with a run of rows, others with single ones."""
    spec = load_base_for_lowering(base)
    variants = {variant.name: variant for variant in VARIANTS}
    refs = [lower_directory(make_adapter(variants[name], "llama", base, directory / name), spec, name) for name in NAMES]
    prompts = [(refs[0], 1), (refs[1], 1), (refs[1], 6), (BASE, 6)]
    return [
        greedy(f"{index}", [(index * 31 + 7 * at) % 250 + 5 for at in range(length)], ref, tokens=tokens)
        for index, (ref, length) in enumerate(prompts)
    ]


def answers(base: Path, work: list[Request], **options: Any) -> dict[str, Result]:
    engine = make_engine(base, "float32", **options)
    try:
        return run(engine, work)
    finally:
        engine.close()


def same(found: dict[str, Result], expected: dict[str, Result]) -> None:
    for name, result in expected.items():
        assert found[name].tokens == result.tokens
        torch.testing.assert_close(torch.stack(found[name].logits).cpu(), torch.stack(result.logits).cpu(), rtol=1e-4, atol=1e-4)


def test_a_gpu_takes_the_triton_kernels() -> None:
    chosen = choose_kernels("", torch.bfloat16, torch.device("cuda"))
    assert (chosen.edits, chosen.native, chosen.attention) == (TRITON, None, attention_triton)
    assert isinstance(chosen.make_graph, CudaGraphs)
    plain = choose_kernels("", torch.float64, torch.device("cuda"))
    assert (plain.edits, plain.make_graph) == (None, None)
    assert isinstance(plain.attention, GatheredAttention)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels take no CPU tensors")
def test_the_kernels_in_an_engine(tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_models("llama")
    work = requests(base, tmp_path)
    expected = answers(base, work, kernel=lowrank_reference)
    calls = []

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        TRITON.add(*arguments)

    monkeypatch.setattr(choice, "runs_triton", lambda dtype, device: True)
    engine = make_engine(base, "float32", kernel=replace(TRITON, add=counted))
    assert engine._kernels.attention is attention_triton
    found = run(engine, work)
    engine.close()
    same(found, expected)
    assert calls


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_an_engine_on_a_gpu(tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_models("llama")
    work = requests(base, tmp_path)
    expected = answers(base, work, kernel=lowrank_reference)
    launches = []
    launch = triton_slots._shrink.run
    monkeypatch.setattr(triton_slots._shrink, "run", lambda *args, **kwargs: launches.append(args) or launch(*args, **kwargs))
    same(answers(base, work, device="cuda"), expected)
    assert launches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_decode_steps_are_recorded_on_a_gpu(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    work = requests(base, tmp_path, tokens=12)
    expected = answers(base, work, kernel=lowrank_reference)
    engine = make_engine(base, "float32", device="cuda")
    try:
        for _ in range(2):
            same(run(engine, work), expected)
        assert engine._runner._graphs is not None
        assert engine._runner._graphs.num_recorded
    finally:
        engine.close()
