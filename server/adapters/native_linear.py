"""What a step's programs do at a linear, for the native kernel: records of addresses, compiled once a program and joined once a batch.

Knows where a program's tensors lie and the layout that ``kernels/linear.cpp`` reads; the meaning is ``ir.LinearEdit``'s, and ``linear.SiteWork``
does the same in PyTorch.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from server.adapters.bank import Resident
from server.adapters.kernels import NativeEdits, NativeRuns, join_runs
from server.adapters.native_records import NativeRecords
from server.adapters.packed import SiteLayout
from server.adapters.pairs import are_pairs

_RECORD = struct.Struct("17q")


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


def native_linear_work(
    records: NativeRecords, here: Sequence[tuple[Resident, int, int, SiteLayout]], site: str, in_features: int, out_features: int
) -> NativeLinearWork | None:
    """The work of the runs that have edits at a site; None when none of them is a linear's.

    Raises ValueError for a tensor that does not fit the linear.
    """
    before, after = [], []
    for resident, start, end, layout in here:

        def make(resident: Resident = resident, layout: SiteLayout = layout) -> _Terms:
            return _pack(records, resident, layout, in_features, out_features)

        terms = records.once(resident, site, make)
        if terms.acts_before:
            before.append((start, end, terms.record))
        if terms.acts_after:
            after.append((start, end, terms.record))
    if not before and not after:
        return None
    return NativeLinearWork(records.kernel, join_runs(before), join_runs(after))


def _pack(records: NativeRecords, resident: Resident, layout: SiteLayout, in_features: int, out_features: int) -> _Terms:
    rotation, dense, left, right = (records.loose(resident, layout, name) for name in ("rotation", "dense", "left", "right"))
    block = 0 if rotation is None else rotation.shape[-1]
    _check_rotation(rotation, in_features)
    _check_factors(left, right, in_features, out_features)
    if dense is not None and tuple(dense.shape) != (out_features, in_features):
        raise ValueError(f"dense is {tuple(dense.shape)} at a linear of {out_features} by {in_features}")
    if layout.pair_scale is not None and not are_pairs(out_features, layout.pair_group):
        raise ValueError(f"{out_features} outputs are not pairs in groups of {layout.pair_group}")
    record = _RECORD.pack(
        records.vector(resident, layout.in_scale),
        records.vector(resident, layout.out_scale),
        records.vector(resident, layout.shift),
        records.vector(resident, layout.pair_scale),
        layout.pair_group,
        records.matrix(resident, layout.down),
        records.matrix(resident, layout.up),
        layout.rank,
        records.is_bf16(resident),
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
    size = shape[-1]
    fits = size > 0 and in_features % size == 0 and shape in ((1, size, size), (in_features // size, size, size))
    if not fits:
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
