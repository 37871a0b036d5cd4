"""Replaced norm parameters on the native kernel are what the norm's own module makes of them, in every form that families have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from server.adapters.native_norm import native_norm_work
from server.adapters.norm import NormRun, norm_work
from server.adapters.norm_form import norm_form
from tests.server.adapters.conftest import native

WIDTH = 20
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def norms() -> list[nn.Module]:
    made = [
        LlamaRMSNorm(WIDTH, 1e-5),
        LlamaRMSNorm(WIDTH),
        Gemma2RMSNorm(WIDTH),
        nn.LayerNorm(WIDTH),
        nn.LayerNorm(WIDTH, bias=False),
    ]
    for module in made:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return made


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("module", norms(), ids=lambda module: type(module).__name__)
@pytest.mark.parametrize("shape", [(40, WIDTH), (40, 3, WIDTH)])
@torch.inference_mode()
def test_rows_have_the_norm_of_their_own_parameters(
    module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, kernel_dir: Path
) -> None:
    module = module.to(dtype)
    form = norm_form(module)
    assert form is not None
    torch.manual_seed(0)
    names = [name for name, _ in module.named_parameters()]
    runs: list[NormRun] = [
        (start, end, {name: torch.randn(WIDTH).to(dtype) for name in names[: 1 + start % 2]})
        for start, end in ((1, 2), (2, 3), (5, 6), (8, 30), (30, 33))
    ]
    x = 0.01 * torch.randn(*shape).to(dtype)
    x[2], x[35] = float("nan"), float("inf")
    expected: Tensor = module(x)
    found = expected.clone()
    norm_work(module, runs).put(expected, x)
    native_norm_work(native(kernel_dir, dtype), form, module, runs).put(found, x)
    torch.testing.assert_close(found, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True)
    assert torch.isfinite(found).view(40, -1).all(-1).tolist() == [row not in (2, 35) for row in range(40)]


def test_a_norm_of_another_form_stays_with_its_module() -> None:
    class Clipped(LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states).clamp(max=0.1)

    assert norm_form(Clipped(WIDTH)) is None
    assert norm_form(nn.GroupNorm(2, WIDTH)) is None


def test_a_parameter_that_does_not_fit_is_never_read(kernel_dir: Path) -> None:
    module = LlamaRMSNorm(WIDTH)
    form = norm_form(module)
    assert form is not None
    for tensor in (torch.zeros(WIDTH + 1), torch.zeros(WIDTH, dtype=torch.float64)):
        with pytest.raises(ValueError, match="norm's parameter"):
            native_norm_work(native(kernel_dir, torch.float32), form, module, [(0, 1, {"weight": tensor})])
