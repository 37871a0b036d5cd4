"""The Triton low-rank kernels equal the reference: many programs, ragged ranks, rows that nobody edits, hostile neighbours."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.adapters.activations import ACTIVATIONS
from server.adapters.kernels import LowRankRows, lowrank_reference
from server.adapters.kernels.triton_lowrank import lowrank_triton
from server.adapters.kernels.triton_math import ACTIVATION_CODES
from tests.server.adapters.test_kernels import make_index

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter computes with NumPy, which warns of what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


def placed(index: LowRankRows) -> LowRankRows:
    tensors = {name: getattr(index, name) for name in index.__slots__ if isinstance(getattr(index, name), Tensor)}
    return replace(index, **{name: tensor.to(DEVICE) for name, tensor in tensors.items()})


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def random_case(seed: int, width: int, out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, LowRankRows]:
    """Programs of ranks 1–64 with runs of 1–20 rows, and rows between them that belong to nobody."""
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    ranks = [choose.randint(1, 64) for _ in range(4)]
    programs: list[int] = []
    rows: list[int] = []
    row = 0
    for _ in range(4):
        row += choose.choice([0, 0, 1, 3])
        count = choose.choice([1, 1, 2, 20])
        programs += [choose.randrange(4)] * count
        rows += range(row, row + count)
        row += count

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    total = sum(ranks) + 1
    return (
        made(row + 2, out),
        made(row + 2, width),
        made(total, width),
        made(total, out),
        placed(make_index(ranks, programs, rows)),
    )


@pytest.mark.parametrize(("seed", "width", "out"), [(0, 40, 136), (1, 600, 24), (2, 128, 128), (3, 24, 40)])
def test_any_batch_equals_the_reference(seed: int, width: int, out: int) -> None:
    y, x, down, up, index = random_case(seed, width, out, torch.float32)
    expected = y.double()
    lowrank_reference(expected, x.double(), down.double(), up.double(), index)
    lowrank_triton(y, x, down, up, index)
    assert error(y, expected) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    y, x, down, up, index = random_case(7, 72, 40, dtype)
    expected = y.double()
    lowrank_reference(expected, x.double(), down.double(), up.double(), index)
    lowrank_triton(y, x, down, up, index)
    assert error(y, expected) < tolerance


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_and_inner_biases(activation: str) -> None:
    generator = torch.Generator().manual_seed(5)
    down, up, x = (torch.randn(shape, generator=generator).to(DEVICE) for shape in [(30, 24), (30, 24), (6, 24)])
    index = make_index([3, 20, 5], [0, 0, 1, 2, 2], [0, 1, 2, 4, 5])
    ranks = [3, 20, 5]
    biases = [torch.randn(rank, generator=generator) for rank in ranks]
    index = placed(
        replace(
            index,
            activation=activation,
            bias=torch.cat([biases[which] for which in (0, 0, 1, 2, 2)]),
        )
    )
    expected = x.double()
    assert index.bias is not None
    lowrank_reference(expected, x.double(), down.double(), up.double(), replace(index, bias=index.bias.double()))
    # A bottleneck may read what it writes.
    found = x.clone()
    lowrank_triton(found, found, down, up, index)
    assert error(found, expected) < 1e-6


def test_frequent_activations_have_codes() -> None:
    assert set(ACTIVATIONS) - set(ACTIVATION_CODES) == {"elu", "selu", "mish", "leaky_relu", "leakyrelu", "relu6"}


def test_a_row_that_is_not_finite_stays_alone() -> None:
    down, up = torch.full((17, 24), 1e30, device=DEVICE), torch.full((17, 40), 1e30, device=DEVICE)
    x, y = torch.ones(9, 24, device=DEVICE), torch.zeros(9, 40, device=DEVICE)
    x[3], x[5], x[1] = float("nan"), float("inf"), float("nan")
    down[:8], up[:9] = 1e-3, 1e-3
    # Row 1 shares its program's weights with finite rows; rows 3, 5 and 7 have a program that overflows.
    lowrank_triton(y, x, down, up, placed(make_index([8, 8], [0, 0, 0, 1, 0, 1, 0, 1, 0], None)))
    assert torch.isfinite(y).all(-1).tolist() == [row not in (1, 3, 5, 7) for row in range(9)]


def test_a_row_alone_equals_the_row_in_a_batch() -> None:
    y, x, down, up, index = random_case(5, 520, 40, torch.float32)
    together = y.clone()
    lowrank_triton(together, x, down, up, index)
    assert index.rows is not None
    for position in (0, index.rows.shape[0] - 1):
        rank, offset = int(index.ranks[position]), int(index.offsets[position])
        alone = replace(
            index,
            rows=index.rows[position : position + 1],
            down=index.down[offset : offset + rank],
            first_down=index.first_down[position : position + 1],
            first_up=index.first_up[position : position + 1],
            ranks=index.ranks[position : position + 1],
            offsets=torch.zeros(1, dtype=torch.int64, device=DEVICE),
        )
        row = int(index.rows[position])
        single = y.clone()
        lowrank_triton(single, x, down, up, alone)
        assert torch.equal(single[row], together[row])


def test_rows_may_lie_apart() -> None:
    y, x, down, up, index = random_case(3, 40, 24, torch.float32)
    expected = y.clone()
    lowrank_triton(expected, x, down, up, index)
    spread = torch.cat([y, y], dim=1)
    lowrank_triton(spread[:, :24], torch.cat([x, x], dim=1)[:, :40], down, up, index)
    assert torch.equal(spread[:, :24], expected)
    assert torch.equal(spread[:, 24:], y)
