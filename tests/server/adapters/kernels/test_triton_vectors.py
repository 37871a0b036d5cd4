"""The Triton vector kernels give the reference's very bits; the interpreter alone rounds to bf16 in a way of its own."""

from __future__ import annotations

import pytest
import torch

from server.adapters import rows as reference
from server.adapters.kernels import triton_vectors
from server.adapters.rows import VectorRows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VECTORS = torch.randn(9000, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def case(width: int, dtype: torch.dtype, covered: list[int] | None) -> tuple[torch.Tensor, VectorRows]:
    x = torch.randn(6, width, generator=torch.Generator().manual_seed(width)).to(DEVICE, dtype)
    x[2, 1] = float("nan")
    count = 6 if covered is None else len(covered)
    rows = None if covered is None else torch.tensor(covered, device=DEVICE)
    return x, VectorRows(rows, torch.tensor([0, 37, 5000, 64, 37, 1][:count], device=DEVICE))


@pytest.mark.parametrize("covered", [None, [0, 2, 5]], ids=["all", "some"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [24, 1100])
def test_vectors_equal_the_reference(width: int, dtype: torch.dtype, covered: list[int] | None) -> None:
    x, work = case(width, dtype, covered)
    scaled = triton_vectors.scale_rows(x, VECTORS, work)
    found, expected = x.clone(), x.clone()
    triton_vectors.shift_rows(found, VECTORS, work)
    reference.shift_rows(expected, VECTORS, work)
    truncates = dtype == torch.bfloat16 and DEVICE.type == "cpu"
    tolerance = {"rtol": 2**-7 if truncates else 0.0, "atol": 4e-2 if truncates else 0.0, "equal_nan": True}
    torch.testing.assert_close(scaled, reference.scale_rows(x, VECTORS, work), **tolerance)
    torch.testing.assert_close(found, expected, **tolerance)
    assert torch.isnan(found).sum() == 1
