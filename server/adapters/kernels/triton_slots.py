"""Edits by slot on a GPU: a shrink, which sums every row's inner values, and an expand, which scales, adds their product with ``up``, and
shifts. Needs triton, which comes with PyTorch on GPU machines.

Neighbouring rows of one slot form a segment, and one Triton program reads its weights once for up to 16 rows of it. It finds its segment by
itself in the rows' slots: nothing else is built for a batch, and a launch depends on shapes and terms alone. Ranks are looped over as they are.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.adapters.kernels import slots as fields
from server.adapters.kernels.slots import SlotKernels, SlotTerms
from server.adapters.kernels.triton_math import ACTIVATION_CODES, activate, operand
from server.adapters.norm_form import NormForm

_ROWS = 16
"""Rows of a segment that share what is read of its weights; the least that tensor cores multiply."""
_RANKS = 16
_WIDTH = 128
_VECTOR_WIDTH = 1024
_SHARE = 512
"""Inputs that one program of the shrink sums over, so that a single row keeps more than one processor busy. It does not depend on the
batch: sums are taken in the same order whatever a row's neighbours are."""

_RANK, _DOWN, _UP = tl.constexpr(fields.RANK), tl.constexpr(fields.DOWN), tl.constexpr(fields.UP)
_IN_SCALE, _OUT_SCALE, _SHIFT = tl.constexpr(fields.IN_SCALE), tl.constexpr(fields.OUT_SCALE), tl.constexpr(fields.SHIFT)
_BIAS, _KIND = tl.constexpr(fields.BIAS), tl.constexpr(fields.KIND)
_PAIR_SCALE, _PAIR_GROUP = tl.constexpr(fields.PAIR_SCALE), tl.constexpr(fields.PAIR_GROUP)
_NORM_WEIGHT, _NORM_BIAS = tl.constexpr(fields.NORM_WEIGHT), tl.constexpr(fields.NORM_BIAS)


def add_triton(y: Tensor, x: Tensor, rows: Tensor, vectors: Tensor, slots: Tensor, places: Tensor, terms: SlotTerms) -> None:
    """``add_reference`` in fp16, bf16 or fp32. All of ``x`` is read before any of ``y`` is written. Rows may lie apart, the values of a
    row may not."""
    count, shares = slots.shape[0], triton.cdiv(x.shape[1], _SHARE)
    index = (slots, places, count, places.stride(0), terms.kind)
    blocks = {"ROWS": _ROWS, "RANKS": _RANKS, "WIDTH": _WIDTH, "OPERAND": operand(x)}
    sums = None
    if terms.rank:
        # One stride for all ranks up to a power of two: a launch that was recorded serves other programs, too.
        stride = max(_RANKS, triton.next_power_of_2(terms.rank))
        sums = torch.empty((shares, count, stride), dtype=torch.float32, device=x.device)
        _shrink[count, shares](sums, x, rows, *index, x.shape[1], x.stride(0), STRIDE=stride, SHARE=_SHARE, **blocks)
    _expand[count, triton.cdiv(y.shape[1], _WIDTH)](
        y, sums, rows, vectors, *index, y.shape[1], y.stride(0),
        STRIDE=0 if sums is None else sums.shape[2], SHARES=shares, HAS_VECTORS=terms.has_vectors,
        ACTIVATION=ACTIVATION_CODES[terms.activation], **blocks,
    )  # fmt: skip


def scale_triton(x: Tensor, vectors: Tensor, slots: Tensor, places: Tensor) -> Tensor:
    """``scale_reference`` in fp16, bf16 or fp32."""
    scaled, width = torch.empty_like(x), x.shape[1]
    block = min(_VECTOR_WIDTH, triton.next_power_of_2(width))
    grid = slots.shape[0], triton.cdiv(width, block)
    _scale[grid](scaled, x, vectors, slots, places, places.stride(0), width, scaled.stride(0), x.stride(0), WIDTH=block)
    return scaled


def pairs_triton(y: Tensor, z: Tensor, vectors: Tensor, slots: Tensor, places: Tensor) -> None:
    """``pairs_reference`` in fp16, bf16 or fp32."""
    width = y.shape[1]
    block = min(_VECTOR_WIDTH, triton.next_power_of_2(width))
    grid = slots.shape[0], triton.cdiv(width, block)
    _pairs[grid](y, z, vectors, slots, places, places.stride(0), width, y.stride(0), z.stride(0), WIDTH=block)


def norm_triton(y: Tensor, x: Tensor, slots: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None, form: NormForm) -> None:
    """``SlotNorm`` in fp16, bf16 or fp32, computed in fp32 and rounded once. Raises ValueError for rows that are not contiguous."""
    if not y.is_contiguous() or not x.is_contiguous():
        raise ValueError("the kernel takes contiguous rows only")
    width = x.shape[-1]
    rows = x.numel() // width
    _norm[rows,](
        y, x, slots, places, weight, bias, places.stride(0), rows // slots.shape[0], width, form.offset, form.eps,
        IS_CENTERED=form.is_centered, WIDTH=triton.next_power_of_2(width),
    )  # fmt: skip


TRITON = SlotKernels(add_triton, scale_triton, pairs_triton, norm_triton)


@triton.jit
def _segment(slots, places, places_stride, kind, position, count, ROWS: tl.constexpr):
    """The place of the slot at a position, and which of the ``ROWS`` positions from there on are one segment that begins there. None is when
    the place is not of the kind, nor when the segment begins before: segments are cut where positions are multiples of ``ROWS``, and whoever
    is given the first position of a piece takes all of it."""
    step = tl.arange(0, ROWS)
    at = position + step
    inside = (at < count) & (at // ROWS == position // ROWS)
    slot = tl.load(slots + position).to(tl.int64)
    place = places + slot * places_stride
    is_served = (slot != 0) & (tl.load(place + _KIND) == kind)
    same = inside & (tl.load(slots + at, mask=inside, other=-1) == slot)
    # A slot may come again behind another one: that is a segment of its own.
    end = tl.min(tl.where(same, ROWS, step), axis=0)
    continues = (position % ROWS != 0) & (tl.load(slots + tl.maximum(position - 1, 0)) == slot)
    return place, (step < end) & is_served & (not continues)


@triton.jit(do_not_specialize=["count", "kind"])
def _shrink(
    sums, x, arena, slots, places, count, places_stride, kind, width, stride,
    STRIDE: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """``sums[share, row, unit] = x[row, share] @ down[unit, share]``, for one segment and one share of the inputs."""
    position, share = tl.program_id(0), tl.program_id(1)
    place, mine = _segment(slots, places, places_stride, kind, position, count, ROWS)
    if tl.sum(mine.to(tl.int32), axis=0) == 0:
        return
    row = (position + tl.arange(0, ROWS)).to(tl.int64)
    down, rank = tl.load(place + _DOWN), tl.load(place + _RANK)
    for start in range(0, rank, RANKS):
        unit = start + tl.arange(0, RANKS)
        is_unit = unit < rank
        total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
        for begin in range(0, SHARE, WIDTH):
            column = share * SHARE + begin + tl.arange(0, WIDTH)
            is_column = column < width
            given = tl.load(x + row[:, None] * stride + column[None, :], mask=mine[:, None] & is_column[None, :], other=0.0)
            weight = tl.load(
                arena + down + unit[None, :] * width + column[:, None], mask=is_unit[None, :] & is_column[:, None], other=0.0
            )
            total = tl.dot(given.to(OPERAND), weight.to(OPERAND), total, input_precision="ieee")
        target = sums + (share * count + row)[:, None] * STRIDE + unit[None, :]
        tl.store(target, total, mask=mine[:, None] & is_unit[None, :])


@triton.jit(do_not_specialize=["count", "kind"])
def _expand(
    y, sums, arena, vectors, slots, places, count, places_stride, kind, width, stride,
    STRIDE: tl.constexpr, SHARES: tl.constexpr, HAS_VECTORS: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """``y[row, columns] = out_scale * y[row, columns] + act(sums[row] + bias) @ up[:, columns] + shift``, for one segment."""
    position = tl.program_id(0)
    place, mine = _segment(slots, places, places_stride, kind, position, count, ROWS)
    if tl.sum(mine.to(tl.int32), axis=0) == 0:
        return
    row = (position + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_column = column < width
    is_ours = mine[:, None] & is_column[None, :]
    target = y + row[:, None] * stride + column[None, :]
    result = tl.load(target, mask=is_ours, other=0.0).to(tl.float32)
    if HAS_VECTORS:
        scale_at = tl.load(place + _OUT_SCALE)
        scale = tl.load(vectors + scale_at + column, mask=is_column & (scale_at >= 0), other=1.0)
        result = result * scale[None, :]
    if sums is not None:
        up, rank, bias_at = tl.load(place + _UP), tl.load(place + _RANK), tl.load(place + _BIAS)
        delta = tl.zeros((ROWS, WIDTH), dtype=tl.float32)
        for start in range(0, rank, RANKS):
            unit = start + tl.arange(0, RANKS)
            is_unit = unit < rank
            is_inner = mine[:, None] & is_unit[None, :]
            inner = tl.zeros((ROWS, RANKS), dtype=tl.float32)
            for share in range(SHARES):
                inner += tl.load(sums + (share * count + row)[:, None] * STRIDE + unit[None, :], mask=is_inner, other=0.0)
            bias = tl.load(vectors + bias_at + unit, mask=is_unit & (bias_at >= 0), other=0.0)
            inner += bias.to(y.dtype.element_ty).to(tl.float32)[None, :]
            # Selected: an activation need not keep the zeros of units that are not there.
            inner = tl.where(is_inner, activate(inner, ACTIVATION), 0.0).to(y.dtype.element_ty)
            weight = tl.load(
                arena + up + unit[:, None] * width + column[None, :], mask=is_unit[:, None] & is_column[None, :], other=0.0
            )
            delta = tl.dot(inner.to(OPERAND), weight.to(OPERAND), delta, input_precision="ieee")
        result = result + delta
    if HAS_VECTORS:
        shift_at = tl.load(place + _SHIFT)
        shift = tl.load(vectors + shift_at + column, mask=is_column & (shift_at >= 0), other=0.0)
        result = result + shift.to(y.dtype.element_ty).to(tl.float32)[None, :]
    tl.store(target, result.to(y.dtype.element_ty), mask=is_ours)


@triton.jit
def _scale(scaled, x, vectors, slots, places, places_stride, width, scaled_stride, stride, WIDTH: tl.constexpr):
    """``scaled[row] = in_scale * x[row]``, for one block of columns."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    start = tl.load(places + slot * places_stride + _IN_SCALE)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_column = column < width
    scale = tl.load(vectors + start + column, mask=is_column & (slot != 0) & (start >= 0), other=1.0)
    given = tl.load(x + row * stride + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(scaled + row * scaled_stride + column, (given * scale).to(scaled.dtype.element_ty), mask=is_column)


@triton.jit
def _pairs(y, z, vectors, slots, places, places_stride, width, y_stride, z_stride, WIDTH: tl.constexpr):
    """``y[row] += pair_scale * swap(z[row])``, for one block of columns."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    place = places + slot * places_stride
    start, group = tl.load(place + _PAIR_SCALE), tl.load(place + _PAIR_GROUP)
    if slot == 0 or start < 0:
        return
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_column = column < width
    is_first = column % group < group // 2
    partner = tl.where(is_first, column + group // 2, column - group // 2)
    other = tl.load(z + row * z_stride + partner, mask=is_column, other=0.0).to(tl.float32)
    scale = tl.load(vectors + start + column, mask=is_column, other=0.0)
    target = y + row * y_stride + column
    result = tl.load(target, mask=is_column, other=0.0).to(tl.float32) + tl.where(is_first, -other, other) * scale
    tl.store(target, result.to(y.dtype.element_ty), mask=is_column)


@triton.jit
def _norm(
    y, x, slots, places, weight, bias, places_stride, vectors, width, offset, eps, IS_CENTERED: tl.constexpr, WIDTH: tl.constexpr
):
    """``y[row]``, one of a token's ``vectors`` rows, becomes the norm of ``x[row]`` by its program's parameters."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row // vectors).to(tl.int64)
    place = places + slot * places_stride
    weight_at, bias_at = tl.load(place + _NORM_WEIGHT), tl.load(place + _NORM_BIAS)
    if slot == 0 or (weight_at == 0 and bias_at == 0):
        return
    column = tl.arange(0, WIDTH)
    is_column = column < width
    values = tl.load(x + row * width + column, mask=is_column, other=0.0).to(tl.float32)
    if IS_CENTERED:
        values = tl.where(is_column, values - tl.sum(values, axis=0) / width, 0.0)
    values = values / tl.sqrt(tl.sum(values * values, axis=0) / width + eps)
    values = values * (_parameter(weight, weight_at, column, is_column) + offset)
    if bias is not None:
        values = values + _parameter(bias, bias_at, column, is_column)
    tl.store(y + row * width + column, values.to(y.dtype.element_ty), mask=is_column)


@triton.jit
def _parameter(own, address, column, is_column):
    """A norm's parameter: its own, or what lies at an address, if there is one."""
    other = address.to(tl.pointer_type(own.dtype.element_ty))
    given = tl.load(other + column, mask=is_column & (address != 0), other=0.0)
    return tl.where(address != 0, given, tl.load(own + column, mask=is_column, other=0.0)).to(tl.float32)
