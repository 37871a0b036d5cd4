"""Fast kernels equal the reference, on ragged ranks, subsets of rows and hostile values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.adapters.kernels import LowRankRows, load_native, lowrank_concat, lowrank_gather, lowrank_reference
from tests.kernels import KERNELS

IN, OUT, ROWS = 24, 40, 9


def make_index(ranks: list[int], programs: list[int], rows: list[int] | None) -> LowRankRows:
    """Row ``i`` belongs to ``programs[i]``, whose rank is ``ranks[programs[i]]``; programs lie one after the other."""
    starts = [sum(ranks[:index]) for index in range(len(ranks))]
    used = [torch.arange(starts[which], starts[which] + ranks[which]) for which in programs]
    distinct = sorted(set(programs), key=programs.index)
    counts = torch.tensor([ranks[which] for which in programs])
    offsets = torch.cumsum(counts, 0) - counts
    every = torch.cat([torch.arange(starts[which], starts[which] + ranks[which]) for which in distinct])
    owner = torch.repeat_interleave(torch.tensor(distinct), torch.tensor([ranks[which] for which in distinct]))
    down = torch.cat(used)
    return LowRankRows(
        rows=None if rows is None else torch.tensor(rows),
        down=down,
        up=down + 1,
        owner=torch.repeat_interleave(torch.arange(len(programs)), counts),
        offsets=offsets,
        distinct_down=every,
        distinct_up=every + 1,
        member=torch.tensor(programs)[:, None] == owner,
        rank=ranks[programs[0]] if len({ranks[which] for which in programs}) == 1 else 0,
    )


LOW_RANK = (lowrank_gather, lowrank_concat)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("ranks", [[8, 8, 8], [1, 5, 16], [3]])
@pytest.mark.parametrize("rows", [None, [1, 4, 8]])
def test_kernels_equal_the_reference(dtype: torch.dtype, tolerance: float, ranks: list[int], rows: list[int] | None) -> None:
    generator = torch.Generator().manual_seed(3)
    down = torch.randn(64, IN, generator=generator).to(dtype)
    up = torch.randn(64, OUT, generator=generator).to(dtype)
    x = torch.randn(ROWS, IN, generator=generator).to(dtype)
    y = torch.randn(ROWS, OUT, generator=generator).to(dtype)
    count = ROWS if rows is None else len(rows)
    index = make_index(ranks, [which % len(ranks) for which in range(count)], rows)
    expected = y.double()
    lowrank_reference(expected, x.double(), down.double(), up.double(), index)
    for kernel in LOW_RANK:
        found = y.clone()
        kernel(found, x, down, up, index)
        assert float((found.double() - expected).abs().max()) <= tolerance * float(expected.abs().max()), kernel


def test_a_row_that_is_not_finite_stays_alone() -> None:
    down, up = torch.full((64, IN), 1e30), torch.full((64, OUT), 1e30)
    x, y = torch.ones(ROWS, IN), torch.zeros(ROWS, OUT)
    x[3], x[5] = float("nan"), float("inf")
    down[:8], up[:9] = 1e-3, 1e-3
    index = make_index([8, 8], [1 if row in (3, 5, 7) else 0 for row in range(ROWS)], None)
    for kernel in (lowrank_reference, *LOW_RANK):
        found = y.clone()
        kernel(found, x, down, up, index)
        finite = torch.isfinite(found).all(-1)
        assert finite.tolist() == [row not in (3, 5, 7) for row in range(ROWS)], kernel


def test_the_library_is_built_once() -> None:
    load_native(KERNELS, torch.float32, torch.device("cpu"))
    before = {path: path.stat().st_mtime_ns for path in KERNELS.iterdir()}
    load_native(KERNELS, torch.bfloat16, torch.device("cpu"))
    assert {path: path.stat().st_mtime_ns for path in KERNELS.iterdir()} == before
    assert [path.suffix for path in before if path.name.startswith("edits-")] == [".so"]


def test_without_a_compiler_there_is_no_native_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert load_native(tmp_path, torch.float32, torch.device("cpu")) is None
    assert load_native(tmp_path, torch.float64, torch.device("cpu")) is None
