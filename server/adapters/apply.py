"""Executing edits: what a step's programs do at each site. Knows programs and rows; no method, no scheduler.

A ``StepEdits`` is built from a step's runs of rows and kept while the same programs keep the same rows, which in decoding is most
of the time; the index tensors of a site are made on its first use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from server.adapters.bank import Bank, Resident
from server.adapters.kernels import Kernel, LowRankRows, NativeEdits, SlotKernels, lowrank_concat, lowrank_gather
from server.adapters.linear import LinearWork, LongRun, LooseWork, LowRankWork, PairRows, SiteWork
from server.adapters.native_linear import native_linear_work
from server.adapters.native_records import NativeRecords
from server.adapters.packed import SiteLayout
from server.adapters.rows import VectorRows, row_index, vector_rows
from server.adapters.slot_step import SlotStep
from server.adapters.slot_table import SlotTable

T = TypeVar("T")
Places = NativeRecords | SlotTable
"""Where the programs of a bank lie, as a kernel reads it."""
Run = tuple[int, int, int]
"""Rows ``[start, end)`` belong to ``slot``: (slot, start, end)."""

LONG_RUN = 16
LONG_RUN_KERNEL = 64
"""From this many rows on, a run is worth matrix products of its own; with a low-rank kernel that takes all rows, later."""
CONCAT_MAX_RANK = 160
"""Up to this sum of distinct ranks, one dense product over all programs beats gathering per row."""
_LOOSE = ("dense", "rotation", "left", "right")


class Matrices(Protocol):
    """A pair of matrices in the arena: a SiteLayout's or a BottleneckLayout's."""

    @property
    def rank(self) -> int: ...
    @property
    def down(self) -> int: ...
    @property
    def up(self) -> int: ...


class Placed(NamedTuple):
    """Rows ``[start, end)`` and the matrices that act on them; ``bias`` is the offset of the inner bias, if there is one."""

    resident: Resident
    start: int
    end: int
    matrices: Matrices
    bias: int | None = None


class StepEdits:
    """The edits of the programs that own the rows of one ragged batch."""

    def __init__(
        self,
        bank: Bank,
        runs: Sequence[Run],
        kernel: Kernel | None = None,
        places: Places | None = None,
        slots: Tensor | None = None,
    ) -> None:
        """``kernel``: the native one or those by slot, which all edits run on that they know, or a low-rank one that is to be used always.
        ``places`` are kept for it between steps. ``slots (T,)`` int32 take the place of those that the runs say, for kernels by slot: such
        edits are lasting ones, of which nothing may go by runs."""
        self.bank = bank
        self.runs = [(bank.resident(slot), start, end) for slot, start, end in runs if slot]
        self.num_rows = max((end for _, _, end in runs), default=0)
        self.kinds = frozenset[str]().union(*(resident.kinds for resident, _, _ in self.runs))
        places = places or _make_places(bank, kernel)
        self.records = places if isinstance(places, NativeRecords) else None
        self.slots = SlotStep(places, self.runs, self.num_rows, slots) if isinstance(places, SlotTable) else None
        self.is_lasting = slots is not None
        self._kernel = None if isinstance(kernel, NativeEdits | SlotKernels) else kernel
        self._long_run = LONG_RUN if self._kernel is None else LONG_RUN_KERNEL
        self._made: dict[str, Any] = {}

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What ``make`` returns, made on first use and kept as long as these edits."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]  # type: ignore[no-any-return]

    def at(self, site: str) -> list[tuple[Resident, int, int, SiteLayout]]:
        """The runs that have edits at a site."""
        return [(resident, start, end, resident.layouts[site]) for resident, start, end in self.runs if site in resident.layouts]

    def extras(self, site: str, kind: str) -> list[tuple[int, int, dict[str, Any]]]:
        """Runs with edits of a kind that is kept in loose tensors: (start, end, {field: tensor or flag})."""
        return self.once(f"{site} {kind}", lambda: list(self._extras(site, f"{kind}."))) if kind in self.kinds else []

    def _extras(self, site: str, prefix: str) -> Iterator[tuple[int, int, dict[str, Any]]]:
        for resident, start, end, layout in self.at(site):
            held = {**{name: resident.extras[tensor] for name, tensor in layout.extras.items()}, **layout.flags}
            found = {name.removeprefix(prefix): value for name, value in held.items() if name.startswith(prefix)}
            if found:
                yield start, end, found

    def linear(self, site: str, in_features: int, out_features: int) -> LinearWork | None:
        """The work at a linear site; None when no program of the step edits it."""

        def make() -> LinearWork | None:
            here = self.at(site)
            if self.records is not None:
                return native_linear_work(self.records, here, site, in_features, out_features)
            if self.slots is not None:
                return self.slots.linear(site, self._loose_work(here, ()))
            return self._site_work(here, in_features, out_features) if here else None

        return self.once(site, make)

    def vectors_of(self, found: Sequence[tuple[Resident, int, int, int | None]]) -> VectorRows | None:
        """The rows with a vector, from (program, start, end, offset)."""
        return vector_rows(found, self.num_rows, self.bank.vectors.device)

    def low_rank(
        self, placed: Sequence[Placed], in_features: int, out_features: int, activation: str = "linear"
    ) -> LowRankWork | None:
        """The low-rank work of pairs of matrices that share an activation; None when there are none."""
        bank = self.bank
        down, up = bank.row_view(in_features), bank.row_view(out_features)
        long_runs, short = [], []
        for item in placed:
            rank = item.matrices.rank
            if not rank:
                continue
            is_base_dtype = item.resident.rows_dtype is bank.rows.dtype
            if item.end - item.start >= self._long_run or down is None or up is None or not is_base_dtype:
                long_runs.append(
                    LongRun(
                        item.start,
                        item.end,
                        bank.matrix(item.resident, item.matrices.down, rank, in_features),
                        bank.matrix(item.resident, item.matrices.up, rank, out_features),
                        self._bias(item),
                    )
                )
            else:
                short.append(item)
        if not long_runs and not short:
            return None
        distinct = {(item.resident.serial, item.matrices.down): item.matrices.rank for item in short}
        kernel = self._kernel or (lowrank_concat if sum(distinct.values()) <= CONCAT_MAX_RANK else lowrank_gather)
        rows = self._low_rank_rows(short, in_features, out_features, activation) if short else None
        return LowRankWork(tuple(long_runs), rows, kernel, down, up, activation)

    def _bias(self, item: Placed) -> Tensor | None:
        if item.bias is None:
            return None
        start = item.resident.vectors_offset + item.bias
        return self.bank.vectors[start : start + item.matrices.rank].to(self.bank.rows.dtype)

    def _site_work(self, here: list[tuple[Resident, int, int, SiteLayout]], in_features: int, out_features: int) -> SiteWork:
        def vectors(name: str) -> VectorRows | None:
            return self.vectors_of([(resident, start, end, getattr(layout, name)) for resident, start, end, layout in here])

        return SiteWork(
            vectors=self.bank.vectors,
            low_rank=self.low_rank([Placed(*item) for item in here], in_features, out_features),
            in_scale=vectors("in_scale"),
            out_scale=vectors("out_scale"),
            shift=vectors("shift"),
            loose=self._loose_work(here, self._pairs(here)),
        )

    def _pairs(self, here: list[tuple[Resident, int, int, SiteLayout]]) -> tuple[PairRows, ...]:
        groups = sorted({layout.pair_group for *_, layout in here if layout.pair_scale is not None})
        chosen = [[item for item in here if item[3].pair_group == group] for group in groups]
        scales = [self.vectors_of([(*item[:3], item[3].pair_scale) for item in members]) for members in chosen]
        return tuple(PairRows(scale, group) for scale, group in zip(scales, groups, strict=True) if scale is not None)

    def _loose_work(self, here: list[tuple[Resident, int, int, SiteLayout]], pairs: tuple[PairRows, ...]) -> LooseWork | None:
        runs = tuple(
            (start, end, {name: resident.extras[layout.extras[name]] for name in _LOOSE if name in layout.extras})
            for resident, start, end, layout in here
            if any(name in layout.extras for name in _LOOSE)
        )
        return LooseWork(self.bank.vectors, pairs, runs) if pairs or runs else None

    def _low_rank_rows(self, short: list[Placed], in_features: int, out_features: int, activation: str) -> LowRankRows:
        rows: list[int] = []
        ranks: list[int] = []
        member_of: list[int] = []
        index: dict[tuple[int, int], int] = {}
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        biases: list[Tensor] = []
        has_bias = any(item.bias is not None for item in short)
        for item in short:
            key = (item.resident.serial, item.matrices.down)
            if key not in index:
                index[key] = len(downs)
                steps = torch.arange(item.matrices.rank)
                downs.append(steps + (item.resident.rows_offset + item.matrices.down) // in_features)
                ups.append(steps + (item.resident.rows_offset + item.matrices.up) // out_features)
                bias = self._bias(item)
                biases.append(self.bank.rows.new_zeros(item.matrices.rank) if bias is None else bias)
            count = item.end - item.start
            rows += range(item.start, item.end)
            ranks += [item.matrices.rank] * count
            member_of += [index[key]] * count
        device = self.bank.rows.device
        rank_tensor = torch.tensor(ranks)
        offsets = torch.cumsum(rank_tensor, 0) - rank_tensor
        down, up = torch.cat([downs[which] for which in member_of]), torch.cat([ups[which] for which in member_of])
        part_program = torch.repeat_interleave(torch.arange(len(downs)), torch.tensor([part.shape[0] for part in downs]))
        return LowRankRows(
            rows=row_index(rows, self.num_rows, device),
            down=down.to(device),
            up=up.to(device),
            owner=torch.repeat_interleave(torch.arange(len(rows)), rank_tensor).to(device),
            offsets=offsets.to(device),
            distinct_down=torch.cat(downs).to(device),
            distinct_up=torch.cat(ups).to(device),
            member=(torch.tensor(member_of)[:, None] == part_program).to(device),
            rank=ranks[0] if len(set(ranks)) == 1 else 0,
            bias=torch.cat([biases[which] for which in member_of]) if has_bias else None,
            distinct_bias=torch.cat(biases) if has_bias else None,
            activation=activation,
        )


class EditCache:
    """The last few StepEdits, by the programs and rows that they were built for."""

    def __init__(self, bank: Bank, *, capacity: int = 16, kernel: Kernel | None = None) -> None:
        self._bank = bank
        self._capacity = capacity
        self._kernel = kernel
        self._places = _make_places(bank, kernel)
        self._entries: OrderedDict[tuple[tuple[int, int, int], ...], StepEdits] = OrderedDict()
        bank.watch(self._forget)

    def get(self, runs: Sequence[Run]) -> StepEdits | None:
        """The edits for these runs; None when they are all the base's, which takes the plain path."""
        if not any(slot for slot, _, _ in runs):
            return None
        # Slots are reused and serials are not: a key never outlives the program that it was made for.
        key = tuple((self._bank.resident(slot).serial if slot else 0, start, end) for slot, start, end in runs)
        edits = self._entries.pop(key, None) or StepEdits(self._bank, runs, self._kernel, self._places)
        self._entries[key] = edits
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return edits

    def lasting(self, runs: Sequence[Run], slots: Tensor) -> StepEdits:
        """Edits for any rows whose programs have the same terms as these, by what is in ``slots (T,)`` when they are run; kept by the caller."""
        return StepEdits(self._bank, runs, self._kernel, self._places, slots)

    def _forget(self, serial: int) -> None:
        """A program went: what was built for it would keep its tensors."""
        if self._places is not None:
            self._places.forget(serial)
        for key in [key for key in self._entries if any(held == serial for held, _, _ in key)]:
            del self._entries[key]


def _make_places(bank: Bank, kernel: Kernel | None) -> Places | None:
    """What a kernel keeps of where programs lie; None for those in PyTorch, which keep nothing."""
    if isinstance(kernel, NativeEdits):
        return NativeRecords(bank, kernel)
    return SlotTable(bank, kernel) if isinstance(kernel, SlotKernels) else None
