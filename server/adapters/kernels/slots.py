"""Edits by slot: ``y = out_scale * y + act(x @ down.T + bias) @ up + shift``, each row with what the program in its slot has at one place.

Nothing is built for a batch but its rows' slots, ``slots (T,)`` int32. ``places (slots, FIELDS)`` int64, a row for each slot, says where a
program's tensors lie: its rows may lie apart, so that it can be one place of a table of all. Slot 0 is the base, whose row of zeros has no
rank and is never asked for vectors. Offsets are elements of the arenas ``rows`` (base dtype) and ``vectors`` (fp32), -1 for what is not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from server.adapters.activations import ACTIVATIONS
from server.adapters.norm_form import NormForm
from server.adapters.pairs import swap_pairs

RANK, DOWN, UP, IN_SCALE, OUT_SCALE, SHIFT, BIAS, KIND, PAIR_SCALE, PAIR_GROUP, NORM_WEIGHT, NORM_BIAS = range(12)
FIELDS = 12
"""Of a place: ``down (rank, in)`` and ``up (rank, out)`` are offsets into ``rows``; the scales, ``shift`` and ``bias (rank,)`` into
``vectors``. A call of SlotAdd serves the rows whose places are of its kind. Outputs are paired in groups of PAIR_GROUP. A norm's parameters
are addresses of tensors in the base's dtype, 0 where the norm's own serve."""
NOTHING = (0, 0, 0, -1, -1, -1, -1, 0, -1, 0, 0, 0)
"""A place where a program has no edit."""


@dataclass(frozen=True, slots=True)
class SlotTerms:
    """What a call is to compute. ``rank``: no row's is higher; 0: no row has a low-rank term. ``has_vectors``: some row has a scale of
    outputs or a shift. ``activation``: a name of ACTIVATIONS, which all rows of the kind share."""

    rank: int
    has_vectors: bool
    kind: int = 0
    activation: str = "linear"


class SlotAdd(Protocol):
    """Changes ``y (T, out)`` in place, from ``x (T, in)``, which may be ``y`` itself. Sums are taken in fp32 (fp64 where that is the base's
    dtype) and rounded once; shift and bias are rounded to the base's dtype before they are added."""

    def __call__(
        self, y: Tensor, x: Tensor, rows: Tensor, vectors: Tensor, slots: Tensor, places: Tensor, terms: SlotTerms
    ) -> None: ...


class SlotScale(Protocol):
    """``in_scale * x`` for ``x (T, in)`` as a new tensor; rows without one are as they were."""

    def __call__(self, x: Tensor, vectors: Tensor, slots: Tensor, places: Tensor) -> Tensor: ...


class SlotPairs(Protocol):
    """``y += pair_scale * swap(z)`` in place, where ``z (T, out)`` is another tensor; ``swap`` as in ``ir.LinearEdit``."""

    def __call__(self, y: Tensor, z: Tensor, vectors: Tensor, slots: Tensor, places: Tensor) -> None: ...


class SlotNorm(Protocol):
    """Puts the norms of ``x (T, …, width)`` into ``y``, of the same shape, for the rows that have parameters of their own; both are
    contiguous. ``weight`` and ``bias (width,)`` are the norm's own, ``bias`` None where it has none."""

    def __call__(
        self, y: Tensor, x: Tensor, slots: Tensor, places: Tensor, weight: Tensor, bias: Tensor | None, form: NormForm
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class SlotKernels:
    """Kernels that run on one device. ``norm`` None: norms go by runs of rows."""

    add: SlotAdd
    scale: SlotScale
    pairs: SlotPairs
    norm: SlotNorm | None


def add_reference(y: Tensor, x: Tensor, rows: Tensor, vectors: Tensor, slots: Tensor, places: Tensor, terms: SlotTerms) -> None:
    """Row by row, exactly as the formula reads."""
    given, wide = x.clone(), vectors.dtype
    for row, slot in enumerate(slots.tolist()):
        place = places[slot].tolist()
        if not slot or place[KIND] != terms.kind:
            continue
        z = y[row].to(wide)
        if place[OUT_SCALE] >= 0:
            z = z * _vector(vectors, place[OUT_SCALE], y.shape[1])
        if rank := place[RANK]:
            down = rows[place[DOWN] : place[DOWN] + rank * x.shape[1]].view(rank, -1).to(wide)
            up = rows[place[UP] : place[UP] + rank * y.shape[1]].view(rank, -1).to(wide)
            inner = down @ given[row].to(wide)
            if place[BIAS] >= 0:
                inner = inner + _vector(vectors, place[BIAS], rank).to(y.dtype).to(wide)
            z = z + ACTIVATIONS[terms.activation](inner).to(y.dtype).to(wide) @ up
        if place[SHIFT] >= 0:
            z = z + _vector(vectors, place[SHIFT], y.shape[1]).to(y.dtype).to(wide)
        y[row] = z.to(y.dtype)


def scale_reference(x: Tensor, vectors: Tensor, slots: Tensor, places: Tensor) -> Tensor:
    """Row by row."""
    scaled = x.clone()
    for row, slot in enumerate(slots.tolist()):
        start = int(places[slot, IN_SCALE]) if slot else -1
        if start >= 0:
            scaled[row] = (x[row].to(vectors.dtype) * _vector(vectors, start, x.shape[1])).to(x.dtype)
    return scaled


def pairs_reference(y: Tensor, z: Tensor, vectors: Tensor, slots: Tensor, places: Tensor) -> None:
    """Row by row."""
    for row, slot in enumerate(slots.tolist()):
        start, group = places[slot, [PAIR_SCALE, PAIR_GROUP]].tolist()
        if slot and start >= 0:
            swapped = swap_pairs(z[row].to(vectors.dtype), group)
            y[row] = (y[row].to(vectors.dtype) + swapped * _vector(vectors, start, z.shape[1])).to(y.dtype)


REFERENCE = SlotKernels(add_reference, scale_reference, pairs_reference, None)
"""Of a norm's parameters PyTorch has no use for addresses: its reference is ``norm.ModuleNormWork``."""


def _vector(vectors: Tensor, start: int, length: int) -> Tensor:
    return vectors[start : start + length]
