"""A model on native modules says what it said before, for every family; and which parts of it are native is asserted, not assumed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from server.adapters import packed
from server.adapters.ir import LinearEdit, NormEdit, Program
from server.adapters.program_file import write_program
from server.engine.kernels import GatheredAttention
from server.engine.kernels.modules import GatedMLP, NativeRMSNorm, RotaryAttention
from server.engine.kernels.packed_linear import PackedLinear
from server.engine.kernels.stack import DecoderStack
from server.engine.types import BASE, ProgramRef, Task
from tests.conftest import TinyModels
from tests.harness import ask, greedy, load_base_for_lowering, make_encoder, make_engine, run
from tests.tiny import ENCODERS, FAMILIES

# Of two layers: linears, norms, gated MLPs, rotary attentions; and bodies.
NATIVE = {
    "llama": (15, 5, 2, 2, 1),
    "mistral": (15, 5, 2, 2, 1),
    "qwen2": (15, 5, 2, 2, 1),
    "qwen3": (15, 9, 2, 2, 1),
    "phi3": (9, 5, 0, 0, 0),
    "gemma2": (15, 0, 0, 0, 0),
    "gpt2": (9, 0, 0, 0, 0),
    "opt": (13, 0, 0, 0, 0),
}


def kinds(model: torch.nn.Module) -> tuple[int, ...]:
    found = Counter(type(module) for module in model.modules())
    return tuple(found[kind] for kind in (PackedLinear, NativeRMSNorm, GatedMLP, RotaryAttention, DecoderStack))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tiny_models: TinyModels, kernel_dir: Path, family: str) -> None:
    directory = tiny_models(family)
    requests = [greedy(str(seed), [3 + seed, *range(20, 20 + 9 * seed)], tokens=6) for seed in range(4)]
    plain = make_engine(directory)
    fast = make_engine(directory, kernel_dir=str(kernel_dir))
    assert kinds(fast._base.model) == NATIVE[family]
    assert kinds(plain._base.model) == (0, 0, 0, 0, 0)
    assert isinstance(plain._runner._attention.kernel, GatheredAttention)
    assert not isinstance(fast._runner._attention.kernel, GatheredAttention)
    wanted, found = run(plain, requests), run(fast, requests)
    for name, result in wanted.items():
        assert found[name].tokens == result.tokens
        torch.testing.assert_close(torch.stack(found[name].logits), torch.stack(result.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_alone_is_packed_bit_for_bit(tiny_models: TinyModels, kernel_dir: Path, family: str) -> None:
    """Also in chunks of a few tokens, and behind a cached prefix."""
    directory = tiny_models(family)
    requests = [greedy(str(seed), [3 + seed, *range(20, 20 + 9 * seed)], tokens=6) for seed in range(4)]
    together = run(make_engine(directory, kernel_dir=str(kernel_dir)), requests)
    chunked = run(make_engine(directory, kernel_dir=str(kernel_dir), max_batch_tokens=8), requests)
    for request in requests:
        engine = make_engine(directory, kernel_dir=str(kernel_dir))
        name = request.request_id
        alone = run(engine, [request])[name]
        cached = run(engine, [request])[name]
        for other in (together[name], chunked[name], cached):
            assert other.tokens == alone.tokens
            assert torch.equal(torch.stack(other.logits), torch.stack(alone.logits))
        assert cached.num_cached_tokens == (len(request.prompt_token_ids) - 1) // 16 * 16


def edited_everywhere(directory: Path, file: Path, dtype: torch.dtype = torch.float32) -> ProgramRef:
    """A program with a low-rank term at every linear, rounded to ``dtype``, and another weight in every norm."""
    spec, program, generator = load_base_for_lowering(directory).spec, Program(), torch.Generator().manual_seed(5)
    for site in spec.sites:
        if site.kind == "linear":
            widths = (site.in_features, site.out_features)
            down, up = ((torch.randn(3, width, generator=generator) * 0.3).to(dtype).float() for width in widths)
            program.add(site.name, LinearEdit(down=down, up=up))
        elif site.kind == "norm":
            program.add(site.name, NormEdit(weight=1 + 0.5 * torch.randn(site.out_features, generator=generator)))
    write_program(file, program, program_id="everywhere", facts={})
    return ProgramRef("everywhere", str(file))


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_stay_with_their_rows(tiny_models: TinyModels, kernel_dir: Path, tmp_path: Path, family: str) -> None:
    """Edits on native modules are what they are on the original ones, and the base's rows beside them are the base's."""
    directory = tiny_models(family)
    program = edited_everywhere(directory, tmp_path / "everywhere.safetensors")
    requests = [
        greedy(str(seed), [3 + seed, *range(20, 20 + 9 * seed)], (BASE, program)[seed % 2], tokens=6) for seed in range(5)
    ]
    wanted, found = run(make_engine(directory), requests), run(make_engine(directory, kernel_dir=str(kernel_dir)), requests)
    alone = run(make_engine(directory, kernel_dir=str(kernel_dir)), [request for request in requests if request.program == BASE])
    for name, result in wanted.items():
        assert found[name].tokens == result.tokens
        torch.testing.assert_close(torch.stack(found[name].logits), torch.stack(result.logits), rtol=1e-3, atol=1e-3)
        if name in alone:
            assert torch.equal(torch.stack(found[name].logits), torch.stack(alone[name].logits))


def test_programs_in_bf16_compute_what_they_do_in_fp32(
    tiny_models: TinyModels, kernel_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, where they are kept so and where they are widened."""
    directory = tiny_models("llama")
    exact = edited_everywhere(directory, tmp_path / "exact.safetensors", torch.bfloat16)
    monkeypatch.setattr(packed, "shortened", lambda flat: flat)
    wide = edited_everywhere(directory, tmp_path / "wide.safetensors", torch.bfloat16)
    for kernels, kept in ((str(kernel_dir), torch.bfloat16), ("", torch.float32)):
        results = []
        for program, dtype in ((exact, kept), (wide, torch.float32)):
            engine = make_engine(directory, kernel_dir=kernels)
            requests = [
                greedy(str(seed), [3 + seed, *range(20, 20 + 9 * seed)], (BASE, program)[seed % 2], tokens=6) for seed in range(4)
            ]
            results.append(run(engine, requests))
            resident = engine.bank.find("everywhere")
            assert resident is not None
            assert resident.rows_dtype is dtype
        for name, result in results[0].items():
            assert torch.equal(torch.stack(result.logits), torch.stack(results[1][name].logits))


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(tiny_models: TinyModels, kernel_dir: Path, family: str) -> None:
    directory = tiny_models(family)
    requests = [ask(str(seed), [1, *range(20, 30 + seed)], task=Task.EMBED) for seed in range(3)]
    plain, fast = make_encoder(directory), make_encoder(directory, kernel_dir=str(kernel_dir))
    assert kinds(fast._base.model)[0] == 12
    wanted, found = run(plain, requests), run(fast, requests)
    for name, result in wanted.items():
        torch.testing.assert_close(found[name].rows, result.rows, rtol=1e-4, atol=1e-4)


def test_without_a_compiler_pytorch_runs(tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    engine = make_engine(tiny_models("llama"), kernel_dir=str(tmp_path / "kernels"))
    assert kinds(engine._base.model) == (0, 0, 0, 0, 0)
    assert run(engine, [greedy("a", [5, 6, 7])])["a"].finish_reason == "length"
