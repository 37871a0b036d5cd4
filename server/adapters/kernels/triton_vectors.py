"""Vectors applied to rows on a GPU, in one kernel each. Needs triton, which comes with PyTorch on GPU machines."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.adapters.rows import VectorRows

_WIDTH = 1024


def scale_rows(x: Tensor, vectors: Tensor, work: VectorRows) -> Tensor:
    """As ``rows.scale_rows``, with vectors in fp32."""
    scaled = torch.empty_like(x) if work.rows is None else x.clone()
    _launch(_scale, scaled, x, vectors, work)
    return scaled


def shift_rows(y: Tensor, vectors: Tensor, work: VectorRows) -> None:
    """As ``rows.shift_rows``, with vectors in fp32."""
    _launch(_shift, y, y, vectors, work)


def _launch(kernel, y: Tensor, x: Tensor, vectors: Tensor, work: VectorRows) -> None:
    width = x.shape[1]
    block = min(_WIDTH, triton.next_power_of_2(width))
    grid = work.index.shape[0], triton.cdiv(width, block)
    kernel[grid](y, x, vectors, work.rows, work.index, width, y.stride(0), x.stride(0), WIDTH=block)


@triton.jit
def _scale(y, x, vectors, rows, index, width, y_stride, x_stride, WIDTH: tl.constexpr):
    """``y[row] = x[row] * vectors[index:]``, for one block of columns."""
    position = tl.program_id(0)
    row = position.to(tl.int64) if rows is None else tl.load(rows + position)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_column = column < width
    vector = tl.load(vectors + tl.load(index + position) + column, mask=is_column, other=0.0)
    given = tl.load(x + row * x_stride + column, mask=is_column, other=0.0)
    tl.store(y + row * y_stride + column, (given.to(tl.float32) * vector).to(y.dtype.element_ty), mask=is_column)


@triton.jit
def _shift(y, x, vectors, rows, index, width, y_stride, x_stride, WIDTH: tl.constexpr):
    """``y[row] = x[row] + vectors[index:]``, for one block of columns; the vector is rounded to the rows' precision first."""
    position = tl.program_id(0)
    row = position.to(tl.int64) if rows is None else tl.load(rows + position)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_column = column < width
    vector = tl.load(vectors + tl.load(index + position) + column, mask=is_column, other=0.0)
    given = tl.load(x + row * x_stride + column, mask=is_column, other=0.0)
    rounded = vector.to(y.dtype.element_ty).to(tl.float32)
    tl.store(y + row * y_stride + column, (given.to(tl.float32) + rounded).to(y.dtype.element_ty), mask=is_column)
