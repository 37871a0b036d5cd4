"""What a step's programs do at a linear, for the native kernel: records of addresses, compiled once a program and joined once a batch.

Knows where a program's tensors lie and the layout that ``kernels/linear.cpp`` reads; the meaning is ``ir.LinearEdit``'s, and ``linear.SiteWork``
does the same in PyTorch. Addresses stay good as long as their program keeps its serial: the bank tells when it does not.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from server.adapters.bank import Bank, Resident
from server.adapters.kernels import NativeEdits, NativeRuns, join_runs
from server.adapters.packed import SiteLayout

_RECORD = struct.Struct("16q")


@dataclass(frozen=True, slots=True)
class NativeLinearWork:
    """``linear.SiteWork`` as two calls; None where no program has anything to do before or after the base."""

    kernel: NativeEdits
    input_terms: NativeRuns | None
    output_terms: NativeRuns | None

    def before(self, x: Tensor) -> Tensor:
        """What the base reads in place of ``x (N, in)``."""
        return x if self.input_terms is None else self.kernel.linear_before(x, self.input_terms)

    def after(self, z: Tensor, x: Tensor) -> Tensor:
        """The result ``(N, out)`` from the base's output ``z``, which may be changed, and what came in."""
        return z if self.output_terms is None else self.kernel.linear_after(z, x, self.output_terms)


@dataclass(frozen=True, slots=True)
class _Terms:
    """One program's record at one site, and on which side of the base it acts."""

    record: bytes
    acts_before: bool
    acts_after: bool


class NativeLinears:
    """The linear work of a bank's programs, by serial and site."""

    def __init__(self, bank: Bank, kernel: NativeEdits) -> None:
        self._bank = bank
        self._kernel = kernel
        self._terms: dict[int, dict[str, _Terms]] = {}

    def work(
        self, here: Sequence[tuple[Resident, int, int, SiteLayout]], site: str, in_features: int, out_features: int
    ) -> NativeLinearWork | None:
        """The work of the runs that have edits at a site; None when none of them is a linear's.

        Raises ValueError for a tensor that does not fit the linear.
        """
        before, after = [], []
        for resident, start, end, layout in here:
            known = self._terms.setdefault(resident.serial, {})
            terms = known.get(site)
            if terms is None:
                terms = known[site] = self._pack(resident, layout, in_features, out_features)
            if terms.acts_before:
                before.append((start, end, terms.record))
            if terms.acts_after:
                after.append((start, end, terms.record))
        if not before and not after:
            return None
        return NativeLinearWork(self._kernel, join_runs(before), join_runs(after))

    def forget(self, serial: int) -> None:
        """A program went or moved."""
        self._terms.pop(serial, None)

    def _pack(self, resident: Resident, layout: SiteLayout, in_features: int, out_features: int) -> _Terms:
        bank = self._bank

        def vector(offset: int | None) -> int:
            return 0 if offset is None else bank.vectors.data_ptr() + (resident.vectors_offset + offset) * bank.vectors.itemsize

        def matrix(offset: int) -> int:
            return bank.rows.data_ptr() + (resident.rows_offset + offset) * bank.rows.itemsize if layout.rank else 0

        def loose(name: str) -> Tensor | None:
            tensor = resident.extras[layout.extras[name]] if name in layout.extras else None
            if tensor is not None and (tensor.dtype != bank.rows.dtype or not tensor.is_contiguous()):
                raise ValueError(f"{name} is {tensor.dtype}, not a contiguous {bank.rows.dtype}")
            return tensor

        rotation, dense, left, right = (loose(name) for name in ("rotation", "dense", "left", "right"))
        block = 0 if rotation is None else rotation.shape[-1]
        _check_rotation(rotation, in_features)
        _check_factors(left, right, in_features, out_features)
        if dense is not None and tuple(dense.shape) != (out_features, in_features):
            raise ValueError(f"dense is {tuple(dense.shape)} at a linear of {out_features} by {in_features}")
        if layout.pair_scale is not None and (
            layout.pair_group <= 0 or layout.pair_group % 2 or out_features % layout.pair_group
        ):
            raise ValueError(f"{out_features} outputs are not pairs in groups of {layout.pair_group}")
        record = _RECORD.pack(
            vector(layout.in_scale),
            vector(layout.out_scale),
            vector(layout.shift),
            vector(layout.pair_scale),
            layout.pair_group,
            matrix(layout.down),
            matrix(layout.up),
            layout.rank,
            _address(rotation),
            block,
            0 if rotation is None else int(rotation.shape[0] == 1),
            _address(dense),
            _address(left),
            _address(right),
            0 if left is None else left.shape[0],
            0 if left is None else left.shape[1],
        )
        vectors = (layout.out_scale, layout.shift, layout.pair_scale)
        return _Terms(
            record,
            acts_before=layout.in_scale is not None or rotation is not None,
            acts_after=bool(layout.rank) or dense is not None or left is not None or any(item is not None for item in vectors),
        )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_rotation(rotation: Tensor | None, in_features: int) -> None:
    if rotation is None:
        return
    shape = tuple(rotation.shape)
    if (
        len(shape) != 3
        or shape[1] != shape[2]
        or (shape[0] != 1 and shape[0] * shape[1] != in_features)
        or in_features % shape[1]
    ):
        raise ValueError(f"rotation is {shape} at a linear of {in_features} inputs")


def _check_factors(left: Tensor | None, right: Tensor | None, in_features: int, out_features: int) -> None:
    if left is None and right is None:
        return
    shapes = [() if item is None else tuple(item.shape) for item in (left, right)]
    if [len(shape) for shape in shapes] != [2, 2]:
        raise ValueError(f"left and right are {shapes}; both must be matrices")
    (a, b), (c, d) = shapes
    if a * c != out_features or b * d != in_features:
        raise ValueError(f"left {a, b} and right {c, d} make no {out_features} by {in_features}")
