"""Where a bank's programs lie, as addresses for the native kernels. Knows arenas and serials, not what an edit means.

A record holds the addresses of one program's tensors at one site. It is made once and stays good as long as its program keeps its serial;
the bank tells when it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from server.adapters.bank import Bank, Resident
from server.adapters.kernels import NativeEdits
from server.adapters.packed import SiteLayout

R = TypeVar("R")


class NativeRecords:
    """Records of the programs of one bank, for one kernel."""

    def __init__(self, bank: Bank, kernel: NativeEdits) -> None:
        self.kernel = kernel
        self._bank = bank
        self._made: dict[int, dict[str, object]] = {}

    def once(self, resident: Resident, key: str, make: Callable[[], R]) -> R:
        """What ``make`` returns, made on first use and kept as long as the program stays where it is."""
        made = self._made.setdefault(resident.serial, {})
        if key not in made:
            made[key] = make()
        return made[key]  # type: ignore[return-value]

    def forget(self, serial: int) -> None:
        """A program went or moved."""
        self._made.pop(serial, None)

    def vector(self, resident: Resident, offset: int | None) -> int:
        """The address of a program's vector; 0 where it has none."""
        vectors = self._bank.vectors
        return 0 if offset is None else vectors.data_ptr() + (resident.vectors_offset + offset) * vectors.itemsize

    def matrix(self, resident: Resident, offset: int) -> int:
        """The address of a program's matrix, whose numbers are of ``resident.rows_dtype``."""
        rows = self._bank.rows
        return rows.data_ptr() + resident.rows_offset * rows.itemsize + offset * resident.rows_dtype.itemsize

    def is_bf16(self, resident: Resident) -> int:
        """Whether a program's matrices are in bf16, as the kernels read it."""
        return int(resident.rows_dtype is torch.bfloat16)

    def loose(self, resident: Resident, layout: SiteLayout, name: str) -> Tensor | None:
        """A tensor that a site has of its own, fit to be read by its address. Raises ValueError when it is not."""
        tensor = resident.extras[layout.extras[name]] if name in layout.extras else None
        if tensor is not None and (tensor.dtype != self._bank.rows.dtype or not tensor.is_contiguous()):
            raise ValueError(f"{name} is {tensor.dtype}, not a contiguous {self._bank.rows.dtype}")
        return tensor
