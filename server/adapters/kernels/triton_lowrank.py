"""The low-rank term on a GPU: a shrink, which sums every row's inner values, and an expand, which adds their product with ``up``.

Neighbouring rows of one program form a segment, and one Triton program reads the weights once for up to 16 rows of it. It finds its
segment by itself in the index that all kernels are given: nothing is built on the host, and a launch depends on shapes alone. Ranks are
looped over as they are. Needs triton, which comes with PyTorch on GPU machines.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.adapters.kernels.lowrank import LowRankRows, lowrank_gather
from server.adapters.kernels.triton_math import ACTIVATION_CODES, activate, operand

_ROWS = 16
"""Rows of a segment that share what is read of its weights; the least that tensor cores multiply."""
_RANKS = 16
_WIDTH = 128
_SHARE = 512
"""Inputs that one program of the shrink sums over, so that a single row keeps more than one processor busy. It does not depend on the
batch: sums are taken in the same order whatever a row's neighbours are."""


def lowrank_triton(y: Tensor, x: Tensor, down: Tensor, up: Tensor, index: LowRankRows) -> None:
    """``lowrank_reference`` in fp16, bf16 or fp32, accumulated in fp32; activations without a code take ``lowrank_gather``.

    ``x`` may be ``y``: all of it is read before any of it is written. Rows may lie apart, the values of a row may not.
    """
    activation = ACTIVATION_CODES.get(index.activation)
    if activation is None:
        lowrank_gather(y, x, down, up, index)
        return
    count, total, shares = index.ranks.shape[0], index.down.shape[0], triton.cdiv(x.shape[1], _SHARE)
    sums = torch.empty((shares, total), dtype=torch.float32, device=x.device)
    segments = (index.rows, index.first_down, index.first_up, index.ranks, index.offsets, count, total)
    blocks = {"ROWS": _ROWS, "RANKS": _RANKS, "WIDTH": _WIDTH, "OPERAND": operand(x)}
    _shrink[count, shares](sums, x, down, *segments, x.shape[1], x.stride(0), SHARE=_SHARE, **blocks)
    _expand[count, triton.cdiv(y.shape[1], _WIDTH)](
        y, sums, up, index.bias, *segments, y.shape[1], y.stride(0), SHARES=shares, ACTIVATION=activation, **blocks
    )


@triton.jit
def _mine(first_down, first_up, ranks, position, count, ROWS: tl.constexpr):
    """Which of the ``ROWS`` positions from ``position`` on are one segment that begins there. None is when it begins before: segments are
    cut where positions are multiples of ``ROWS``, and whoever is given the first position of a piece takes all of it."""
    step = tl.arange(0, ROWS)
    at = position + step
    inside = (at < count) & (at // ROWS == position // ROWS)
    down, up, rank = tl.load(first_down + position), tl.load(first_up + position), tl.load(ranks + position)
    same = (
        inside
        & (tl.load(first_down + at, mask=inside, other=-1) == down)
        & (tl.load(first_up + at, mask=inside, other=-1) == up)
        & (tl.load(ranks + at, mask=inside, other=-1) == rank)
    )
    # A program may come again behind another one: that is a segment of its own.
    end = tl.min(tl.where(same, ROWS, step), axis=0)
    before = tl.maximum(position - 1, 0)
    continues = (
        (position % ROWS != 0)
        & (tl.load(first_down + before) == down)
        & (tl.load(first_up + before) == up)
        & (tl.load(ranks + before) == rank)
    )
    return (step < end) & (not continues)


@triton.jit(do_not_specialize=["count", "total"])
def _shrink(
    sums, x, down, rows, first_down, first_up, ranks, offsets, count, total, width, stride,
    SHARE: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """``sums[share, offset + unit] = x[row, share] @ down[first + unit, share]``, for one segment and one share of the inputs."""
    position, share = tl.program_id(0), tl.program_id(1)
    mine = _mine(first_down, first_up, ranks, position, count, ROWS)
    if tl.sum(mine.to(tl.int32), axis=0) == 0:
        return
    at = position + tl.arange(0, ROWS)
    row = at.to(tl.int64) if rows is None else tl.load(rows + at, mask=mine, other=0)
    offset = tl.load(offsets + at, mask=mine, other=0)
    first, rank = tl.load(first_down + position), tl.load(ranks + position)
    for start in range(0, rank, RANKS):
        unit = start + tl.arange(0, RANKS)
        is_unit = unit < rank
        total_of_share = tl.zeros((ROWS, RANKS), dtype=tl.float32)
        for begin in range(0, SHARE, WIDTH):
            column = share * SHARE + begin + tl.arange(0, WIDTH)
            is_column = column < width
            given = tl.load(x + row[:, None] * stride + column[None, :], mask=mine[:, None] & is_column[None, :], other=0.0)
            weight = tl.load(
                down + (first + unit)[None, :] * width + column[:, None], mask=is_unit[None, :] & is_column[:, None], other=0.0
            )
            total_of_share = tl.dot(given.to(OPERAND), weight.to(OPERAND), total_of_share, input_precision="ieee")
        target = sums + share * total + offset[:, None] + unit[None, :]
        tl.store(target, total_of_share, mask=mine[:, None] & is_unit[None, :])


@triton.jit(do_not_specialize=["count", "total"])
def _expand(
    y, sums, up, bias, rows, first_down, first_up, ranks, offsets, count, total, width, stride,
    SHARES: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """``y[row, columns] += act(sums[offset + unit] + bias) @ up[first + unit, columns]``, for one segment and one block of columns."""
    position = tl.program_id(0)
    mine = _mine(first_down, first_up, ranks, position, count, ROWS)
    if tl.sum(mine.to(tl.int32), axis=0) == 0:
        return
    at = position + tl.arange(0, ROWS)
    row = at.to(tl.int64) if rows is None else tl.load(rows + at, mask=mine, other=0)
    offset = tl.load(offsets + at, mask=mine, other=0)
    first, rank = tl.load(first_up + position), tl.load(ranks + position)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_column = column < width
    delta = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
    for start in range(0, rank, RANKS):
        unit = start + tl.arange(0, RANKS)
        is_unit = unit < rank
        is_inner = mine[:, None] & is_unit[None, :]
        place = offset[:, None] + unit[None, :]
        inner = tl.zeros((ROWS, RANKS), dtype=tl.float32)
        for share in range(SHARES):
            inner += tl.load(sums + share * total + place, mask=is_inner, other=0.0)
        if bias is not None:
            inner += tl.load(bias + place, mask=is_inner, other=0.0).to(tl.float32)
        # Selected: an activation need not keep the zeros of units that are not there.
        inner = tl.where(is_inner, activate(inner, ACTIVATION), 0.0).to(up.dtype.element_ty)
        weight = tl.load(
            up + (first + unit)[:, None] * width + column[None, :], mask=is_unit[:, None] & is_column[None, :], other=0.0
        )
        delta = tl.dot(inner.to(OPERAND), weight.to(OPERAND), delta, input_precision="ieee")
    target = y + row[:, None] * stride + column[None, :]
    is_ours = mine[:, None] & is_column[None, :]
    changed = tl.load(target, mask=is_ours, other=0.0).to(tl.float32) + delta
    tl.store(target, changed.to(y.dtype.element_ty), mask=is_ours)
