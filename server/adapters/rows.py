"""Vectors of many programs applied to the rows of one batch. Knows arenas and row indices, not what a vector means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from server.adapters.bank import Resident

NORM_EPS = 1e-5
"""Of the layer norms that adapters bring along."""


@dataclass(frozen=True, slots=True)
class VectorRows:
    """The vector at element ``index[i]`` of the arena acts on ``rows[i]``; ``rows`` None: on all rows in order."""

    rows: Tensor | None
    index: Tensor


class VirtualRows(NamedTuple):
    """Rows ``[start, end)`` of a batch are virtual tokens of the slot's program, from its ``offset``-th on."""

    slot: int
    start: int
    end: int
    offset: int = 0


def vector_rows(found: Iterable[tuple[Resident, int, int, int | None]], num_rows: int, device: torch.device) -> VectorRows | None:
    """From (program, first row, end, offset of its vector or None); None when no program has one."""
    rows: list[int] = []
    starts: list[int] = []
    for resident, start, end, offset in found:
        if offset is not None:
            rows += range(start, end)
            starts += [resident.vectors_offset + offset] * (end - start)
    if not rows:
        return None
    return VectorRows(row_index(rows, num_rows, device), torch.tensor(starts, device=device))


def row_index(rows: list[int], num_rows: int, device: torch.device) -> Tensor | None:
    """Row numbers as a tensor, None when they are all rows in order."""
    return None if rows == list(range(num_rows)) else torch.tensor(rows, device=device)


def pick(x: Tensor, rows: Tensor | None) -> Tensor:
    """The rows ``(n, width)`` that an index names."""
    return x if rows is None else x.index_select(0, rows)


def add_rows(y: Tensor, delta: Tensor, rows: Tensor | None) -> None:
    """``y[rows] += delta`` in place."""
    if rows is None:
        y += delta
    else:
        y.index_add_(0, rows, delta.to(y.dtype))


def take(vectors: Tensor, work: VectorRows, width: int) -> Tensor:
    """The vectors at ``index`` (element offsets): ``(rows, width)``."""
    return vectors[work.index[:, None] + torch.arange(width, device=vectors.device)]


def scale_rows(x: Tensor, vectors: Tensor, work: VectorRows) -> Tensor:
    """``x[row] * vector`` for the rows that have one, computed in the vectors' precision; other rows are passed through."""
    scales = take(vectors, work, x.shape[-1])
    if work.rows is None:
        return (x * scales).to(x.dtype)
    return x.index_copy(0, work.rows, (x.index_select(0, work.rows) * scales).to(x.dtype))


def shift_rows(y: Tensor, vectors: Tensor, work: VectorRows) -> None:
    """``y[row] += vector`` in place."""
    add_rows(y, take(vectors, work, y.shape[-1]).to(y.dtype), work.rows)


def norm_rows(x: Tensor, vectors: Tensor, weight: VectorRows, bias: VectorRows | None) -> Tensor:
    """Layer norm of the rows with their own parameters, in the vectors' precision; other rows are passed through."""
    width = x.shape[-1]
    normed = F.layer_norm(pick(x, weight.rows).to(vectors.dtype), (width,), eps=NORM_EPS) * take(vectors, weight, width)
    if bias is not None:
        normed = normed + take(vectors, bias, width)
    return normed.to(x.dtype) if weight.rows is None else x.index_copy(0, weight.rows, normed.to(x.dtype))
