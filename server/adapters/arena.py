"""The bytes of a device that programs lie in: one tensor with a fixed address, read as matrices and as vectors. Knows ranges of it and how a
program lies in one; not who has them, or why.

A program is one range: its matrices first, its vectors behind them. Ranges start at multiples of a unit, so that matrices can also be read as
rows of any width of the base's linears. They take whole units, too: in what is left of the last one no other could start, and so room that
there is by the numbers is room in one piece once all ranges are pushed together.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from server.adapters.extents import Extents, Slide
from server.adapters.packed import PackedProgram

_VECTOR_BYTES = 64
"""Where vectors may start. They are never read as rows: what they need is a place that copies well."""


class Arena:
    """``rows`` (base dtype) and ``vectors`` (fp32; fp64 beside fp64) are views of the same bytes, as many whole units as ``capacity_bytes``
    hold. A range starts at a multiple of ``unit`` elements of ``rows``. ``keeps_bf16``: matrices that were packed in bf16 stay so, otherwise
    all become the base's dtype.

    On a CPU it is address space, not memory: pages are touched when something is copied in.
    """

    def __init__(
        self, capacity_bytes: int, unit: int, *, dtype: torch.dtype, device: torch.device, keeps_bf16: bool = False
    ) -> None:
        self.unit = unit
        self._keeps_bf16 = keeps_bf16
        self._extents = Extents(capacity_bytes, math.lcm(unit * dtype.itemsize, _VECTOR_BYTES))
        self._data = torch.empty(self._extents.capacity, dtype=torch.uint8, device=device)
        self.rows: Tensor = self._data.view(dtype)
        self.vectors: Tensor = self._data.view(torch.float64 if dtype == torch.float64 else torch.float32)

    def rows_dtype(self, program: PackedProgram) -> torch.dtype:
        """What a program's matrices are held in."""
        return torch.bfloat16 if self._keeps_bf16 and program.rows.dtype is torch.bfloat16 else self.rows.dtype

    def num_rows(self, program: PackedProgram) -> int:
        """Elements of ``rows`` that a program's matrices take."""
        return -(-program.rows.numel() * self.rows_dtype(program).itemsize // self.rows.itemsize)

    def nbytes(self, program: PackedProgram) -> int:
        """The bytes that a program's range takes, rounding included."""
        return self._extents.rounded(self._vectors_start(program) + program.vectors.numel() * self.vectors.itemsize)

    def offsets(self, program: PackedProgram, start: int) -> tuple[int, int]:
        """The elements of ``rows`` and of ``vectors`` where a program's begin that lies from byte ``start`` on."""
        return start // self.rows.itemsize, (start + self._vectors_start(program)) // self.vectors.itemsize

    def allocate(self, nbytes: int) -> int | None:
        """The first byte of a free range; None: there is no such range in one piece."""
        return self._extents.allocate(nbytes)

    def release(self, start: int, nbytes: int) -> None:
        """Give back what ``allocate(nbytes)`` returned."""
        self._extents.release(start, nbytes)

    def next_slide(self) -> Slide | None:
        """What ``slide`` would move, in bytes. Changes nothing."""
        return self._extents.next_slide()

    def slide(self, slide: Slide) -> None:
        """Move the range that ``next_slide`` returned. Where there is no memory for it, nothing has changed."""
        self._copy_down(slide)
        self._extents.slide()

    def write(self, program: PackedProgram, start: int) -> None:
        """Copy a program's matrices and vectors to byte ``start``. From pinned memory that runs beside the host, and the device widens."""
        dtype, (rows, vectors) = self.rows_dtype(program), self.offsets(program, start)
        place = self.rows[rows : rows + self.num_rows(program)].view(dtype)[: program.rows.numel()]
        given = program.rows if program.rows.dtype is dtype else program.rows.to(self.rows.device, non_blocking=True)
        place.copy_(given, non_blocking=True)
        self.vectors[vectors : vectors + program.vectors.numel()].copy_(program.vectors, non_blocking=True)

    def _vectors_start(self, program: PackedProgram) -> int:
        """Bytes from a program's start to its vectors."""
        return -(-self.num_rows(program) * self.rows.itemsize // _VECTOR_BYTES) * _VECTOR_BYTES

    def _copy_down(self, slide: Slide) -> None:
        """By way of a copy, since the two ranges may overlap."""
        self._data[slide.to : slide.to + slide.length] = self._data[slide.start : slide.start + slide.length].clone()
