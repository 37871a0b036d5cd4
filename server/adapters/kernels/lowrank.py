"""The low-rank term for rows of many programs: ``y[i] += act(x[i] @ down_i.T + bias_i) @ up_i``, read from the arena in place.

All functions share one signature: ``x (N, in)``, ``y (N, out)`` changed in place, ``down (n, in)`` and ``up (m, out)`` the arena
as rows, and the index of which arena rows belong to which input row. No row ever reads another row's weights or inputs; weights
are finite, so that a row's NaN stays its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from server.adapters.activations import ACTIVATIONS


@dataclass(frozen=True, slots=True)
class LowRankRows:
    """Which arena rows act on which input rows, at one site.

    ``rows (B,)`` are the input rows with a program here, None when they are all of ``x`` in order. Input row ``b`` uses the arena rows
    ``down[offsets[b]:offsets[b + 1]]`` and ``up[…]``, and ``owner`` repeats ``b`` for each. ``distinct_down``/``distinct_up (R,)`` list
    every program's arena rows once, and ``member (B, R)`` says which of them belong to row ``b``. ``rank`` is the rank that all rows
    share, 0 when they differ. ``bias`` (parallel to ``down``) and ``distinct_bias`` (parallel to ``distinct_down``), in the arena's
    dtype, are added before ``activation``, a name of ACTIVATIONS that all rows share.
    """

    rows: Tensor | None
    down: Tensor
    up: Tensor
    owner: Tensor
    offsets: Tensor
    distinct_down: Tensor
    distinct_up: Tensor
    member: Tensor
    rank: int
    bias: Tensor | None = None
    distinct_bias: Tensor | None = None
    activation: str = "linear"


LowRankKernel = Callable[[Tensor, Tensor, Tensor, Tensor, LowRankRows], None]


def lowrank_reference(y: Tensor, x: Tensor, down: Tensor, up: Tensor, index: LowRankRows) -> None:
    """Row by row, exactly as the formula reads."""
    rows = range(x.shape[0]) if index.rows is None else index.rows.tolist()
    bounds = [*index.offsets.tolist(), index.down.shape[0]]
    for position, row in enumerate(rows):
        used = slice(bounds[position], bounds[position + 1])
        inner = x[row] @ down[index.down[used]].T
        y[row] += _activate(inner, None if index.bias is None else index.bias[used], index) @ up[index.up[used]]


def lowrank_gather(y: Tensor, x: Tensor, down: Tensor, up: Tensor, index: LowRankRows) -> None:
    """Many programs, few rows each: gather each row's ``down``, reduce, and let ``embedding_bag`` sum ``up`` without a copy."""
    chosen = x if index.rows is None else x.index_select(0, index.rows)
    gathered = down.index_select(0, index.down)
    if index.rank:
        inner = torch.bmm(gathered.view(-1, index.rank, x.shape[1]), chosen.unsqueeze(2)).view(-1)
    else:
        inner = (gathered * chosen.index_select(0, index.owner)).sum(-1)
    inner = _activate(inner, index.bias, index)
    delta = F.embedding_bag(index.up, up, index.offsets, mode="sum", per_sample_weights=inner)
    _add(y, delta, index.rows)


def lowrank_concat(y: Tensor, x: Tensor, down: Tensor, up: Tensor, index: LowRankRows) -> None:
    """Few programs: one dense product with all of them, from which each row keeps its own part."""
    chosen = x if index.rows is None else x.index_select(0, index.rows)
    inner = _activate(chosen @ down.index_select(0, index.distinct_down).T, index.distinct_bias, index)
    # Selected, not multiplied by 0: what a row makes of a neighbour's weights may overflow.
    inner = torch.where(index.member, inner, inner.new_zeros(()))
    _add(y, inner @ up.index_select(0, index.distinct_up), index.rows)


def _activate(inner: Tensor, bias: Tensor | None, index: LowRankRows) -> Tensor:
    if bias is not None:
        inner = inner + bias
    return inner if index.activation == "linear" else ACTIVATIONS[index.activation](inner)


def _add(y: Tensor, delta: Tensor, rows: Tensor | None) -> None:
    if rows is None:
        y += delta
    else:
        y.index_add_(0, rows, delta)
