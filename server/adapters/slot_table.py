"""Where the edits of a bank's programs lie, as a table on the device that kernels read by slot. Knows layouts and offsets, not what an edit
means.

A program's row is written when a step first uses it, and is good until the program goes or moves; a step itself brings nothing but the slots
of its rows. What has no place here (dense terms, rotations, fusions, …) is found by runs of rows instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.bank import Bank, Resident
from server.adapters.kernels import SlotKernels
from server.adapters.kernels import slots as fields
from server.adapters.kernels.slots import SlotTerms
from server.adapters.packed import BottleneckLayout, SiteLayout
from server.adapters.slot_rows import SlotRows

LOW_RANK, VECTORS, IN_SCALE, PAIRS, NORM = "low_rank", "vectors", "in_scale", "pairs", "norm"

Term = tuple[str, str]
"""A place, and what a program has there: LOW_RANK, VECTORS (a scale of outputs, or a shift), IN_SCALE, PAIRS, NORM, or the kind of its
bottleneck."""


@dataclass(frozen=True, slots=True)
class SlotFacts:
    """What a program has in the table. ``rank`` is the highest of its linears, ``inner`` that of its bottlenecks. ``is_whole``: all that it
    does in a step with no virtual tokens is there."""

    terms: frozenset[Term]
    rank: int
    inner: int
    is_whole: bool


class SlotTable:
    """A place for every linear, norm and sub-layer of the base, in every slot of the bank."""

    def __init__(self, bank: Bank, kernels: SlotKernels) -> None:
        spec = bank.spec
        sites = [site.name for site in spec.sites if site.kind in ("linear", "head", "norm")]
        sublayers = [bottleneck_place(sublayer.site) for sublayer in spec.sublayers]
        self._index = {name: index for index, name in enumerate([*sites, *sublayers])}
        self._bank = bank
        self._kernels = kernels
        shape = (bank.max_slots + 1, len(self._index), fields.FIELDS)
        self.device = bank.rows.device
        self._places = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._facts: dict[int, SlotFacts] = {}
        self._kinds: dict[str, int] = {}

    def facts(self, resident: Resident) -> SlotFacts:
        """What a program has in the table, where it is from now on."""
        found = self._facts.get(resident.serial)
        if found is None:
            places = [list(fields.NOTHING) for _ in self._index]
            terms = frozenset(
                term for site, layout in resident.layouts.items() for term in self._lay(resident, site, layout, places)
            )
            self._places[resident.slot].copy_(torch.tensor(places))
            layouts = resident.layouts.values()
            found = self._facts[resident.serial] = SlotFacts(
                terms,
                rank=max((layout.rank for layout in layouts), default=0),
                inner=max((item.rank for layout in layouts for item in layout.bottlenecks), default=0),
                is_whole=all(self._is_whole(layout) for layout in layouts),
            )
        return found

    def forget(self, serial: int) -> None:
        """A program went or moved."""
        self._facts.pop(serial, None)

    def at(self, place: str, slots: Tensor, terms: SlotTerms) -> SlotRows:
        """Rows of a step at a place. Raises KeyError for a place that the base does not have."""
        places = self._places[:, self._index[place]]
        return SlotRows(self._kernels, self._bank.rows, self._bank.vectors, slots, places, terms)

    def kind(self, name: str) -> int:
        """The number that stands for a kind of bottlenecks in the table."""
        return self._kinds.setdefault(name, len(self._kinds))

    def aside(self, placed: Sequence[tuple[Resident, int, int, BottleneckLayout]], num_rows: int) -> SlotRows:
        """Bottlenecks of one activation that have no place in the table, with places of their own: (program, first row, end, layout)."""
        places, slots = [[0] * fields.FIELDS], [0] * num_rows
        for number, (resident, start, end, layout) in enumerate(placed, 1):
            places.append(_matrices(resident, layout.rank, layout.down, layout.up, layout.down_bias))
            slots[start:end] = [number] * (end - start)
        terms = SlotTerms(max(layout.rank for *_, layout in placed), False, activation=placed[0][3].placement.activation)
        where = torch.tensor(slots, dtype=torch.int32, device=self.device)
        return SlotRows(
            self._kernels, self._bank.rows, self._bank.vectors, where, torch.tensor(places, device=self.device), terms
        )

    def _lay(self, resident: Resident, site: str, layout: SiteLayout, places: list[list[int]]) -> Iterator[Term]:
        def vector(offset: int | None) -> int:
            return -1 if offset is None else resident.vectors_offset + offset

        if site in self._index:
            place = _matrices(resident, layout.rank, layout.down, layout.up, None)
            place[fields.IN_SCALE], place[fields.OUT_SCALE] = vector(layout.in_scale), vector(layout.out_scale)
            place[fields.SHIFT] = vector(layout.shift)
            place[fields.PAIR_SCALE], place[fields.PAIR_GROUP] = vector(layout.pair_scale), layout.pair_group
            for field, name in ((fields.NORM_WEIGHT, "norm.weight"), (fields.NORM_BIAS, "norm.bias")):
                if name in layout.extras:
                    place[field] = resident.extras[layout.extras[name]].data_ptr()
            places[self._index[site]] = place
            if layout.rank:
                yield site, LOW_RANK
            if layout.out_scale is not None or layout.shift is not None:
                yield site, VECTORS
            if layout.in_scale is not None:
                yield site, IN_SCALE
            if layout.pair_scale is not None:
                yield site, PAIRS
            if place[fields.NORM_WEIGHT] or place[fields.NORM_BIAS]:
                yield site, NORM
        if layout.bottlenecks and has_place(layout):
            item, name = layout.bottlenecks[0], bottleneck_place(site)
            place = _matrices(resident, item.rank, item.down, item.up, item.down_bias)
            place[fields.SHIFT], place[fields.KIND] = vector(item.up_bias), self.kind(bottleneck_kind(item))
            places[self._index[name]] = place
            yield name, bottleneck_kind(item)

    def _is_whole(self, layout: SiteLayout) -> bool:
        names = set(layout.extras) - ({"norm.weight", "norm.bias"} if self._kernels.norm is not None else set())
        return not names and not layout.flags and (not layout.bottlenecks or has_place(layout))


def bottleneck_place(site: str) -> str:
    """The place of the bottleneck at a sub-layer's site, which may be a linear with a place of its own."""
    return f"{site} bottleneck"


def bottleneck_kind(layout: BottleneckLayout) -> str:
    """What bottlenecks must share to be computed by one call: ``relu of sublayer``."""
    return f"{layout.placement.activation} of {layout.placement.source}"


def has_place(layout: SiteLayout) -> bool:
    """Whether a site's bottlenecks are one, and that one just an addition to its sub-layer's output, without norms of its own."""
    item = layout.bottlenecks[0]
    norms = (item.before_weight, item.before_bias, item.after_weight, item.after_bias)
    is_addition = item.placement.is_plain and item.weight == 1.0 and norms == (None,) * 4
    return len(layout.bottlenecks) == 1 and is_addition and "fusion.placement" not in layout.flags


def _matrices(resident: Resident, rank: int, down: int, up: int, bias: int | None) -> list[int]:
    """A place with a pair of matrices, and the bias between them."""
    place = list(fields.NOTHING)
    place[fields.RANK] = rank
    place[fields.DOWN], place[fields.UP] = resident.rows_offset + down, resident.rows_offset + up
    place[fields.BIAS] = -1 if bias is None else resident.vectors_offset + bias
    return place
