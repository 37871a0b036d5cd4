"""Executing edits: what a step's programs do at each site. Knows programs and rows; no method, no scheduler.

A ``StepEdits`` is built from a step's runs of rows and kept while the same programs keep the same rows, which in decoding is most
of the time; the index tensors of a site are made on its first use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.bank import Bank, Resident
from server.adapters.kernels import Kernel, LowRankRows, lowrank_concat, lowrank_gather
from server.adapters.program_file import SiteLayout

Run = tuple[int, int, int]
"""Rows ``[start, end)`` belong to ``slot``: (slot, start, end)."""

LONG_RUN = 16
LONG_RUN_NATIVE = 64
"""From this many rows on, a run is worth matrix products of its own; with a kernel that takes all rows, later."""
_LOOSE = ("dense", "rotation", "left", "right")
CONCAT_MAX_RANK = 160
"""Up to this sum of distinct ranks, one dense product over all programs beats gathering per row."""


@dataclass(frozen=True, slots=True)
class VectorRows:
    """The vector at element ``index[i]`` of the arena acts on ``rows[i]``; ``rows`` None: on all rows in order."""

    rows: Tensor | None
    index: Tensor


@dataclass(frozen=True, slots=True)
class PairRows:
    """Rows whose outputs are paired in groups of one size, with their ``pair_scale``."""

    scale: VectorRows
    group: int


@dataclass(frozen=True, slots=True)
class SiteWork:
    """What the programs of a step do at one linear site. Long runs as (start, end, down, up); everything else by row."""

    long_runs: tuple[tuple[int, int, Tensor, Tensor], ...]
    short_rows: LowRankRows | None
    kernel: Kernel
    down: Tensor | None
    up: Tensor | None
    in_scale: VectorRows | None
    out_scale: VectorRows | None
    shift: VectorRows | None
    pairs: tuple[PairRows, ...]
    loose: tuple[tuple[int, int, dict[str, Tensor]], ...]
    """Runs with tensors of their own, by field: ``dense``, ``rotation``, ``left`` and ``right``."""

    @property
    def rotates(self) -> bool:
        return any("rotation" in found for _, _, found in self.loose)


class StepEdits:
    """The edits of the programs that own the rows of one ragged batch."""

    def __init__(self, bank: Bank, runs: Sequence[Run], kernel: Kernel | None = None) -> None:
        self._bank = bank
        self._kernel = kernel
        self._long_run = LONG_RUN if kernel is None else LONG_RUN_NATIVE
        self._runs = [(bank.resident(slot), start, end) for slot, start, end in runs if slot]
        self._num_rows = max((end for _, _, end in runs), default=0)
        self._linear: dict[str, SiteWork | None] = {}

    def extras(self, site: str, prefix: str) -> Iterator[tuple[int, int, dict[str, Tensor]]]:
        """Runs with loose tensors at a site: (start, end, {field: tensor}) of those fields that begin with ``prefix``."""
        for resident, start, end in self._runs:
            layout = resident.layouts.get(site)
            if layout is None:
                continue
            found = {
                name.removeprefix(prefix): resident.extras[tensor]
                for name, tensor in layout.extras.items()
                if name.startswith(prefix)
            }
            if found:
                yield start, end, found

    def linear(self, site: str, in_features: int, out_features: int) -> SiteWork | None:
        """The work at a linear site; None when no program of the step edits it."""
        if site not in self._linear:
            here = [
                (resident, start, end, resident.layouts[site]) for resident, start, end in self._runs if site in resident.layouts
            ]
            self._linear[site] = self._site_work(here, in_features, out_features) if here else None
        return self._linear[site]

    def _site_work(self, here: list[tuple[Resident, int, int, SiteLayout]], in_features: int, out_features: int) -> SiteWork:
        bank = self._bank
        down, up = bank.row_view(in_features), bank.row_view(out_features)
        long_runs, short = [], []
        for resident, start, end, layout in here:
            if not layout.rank:
                continue
            if end - start >= self._long_run or down is None or up is None:
                first, second = resident.rows_offset + layout.down, resident.rows_offset + layout.up
                matrices = (
                    bank.rows[first : first + layout.rank * in_features].view(layout.rank, in_features),
                    bank.rows[second : second + layout.rank * out_features].view(layout.rank, out_features),
                )
                long_runs.append((start, end, *matrices))
            else:
                short.append((resident, start, end, layout))
        distinct = {resident.serial: layout.rank for resident, _, _, layout in short}
        kernel = self._kernel or (lowrank_concat if sum(distinct.values()) <= CONCAT_MAX_RANK else lowrank_gather)
        return SiteWork(
            long_runs=tuple(long_runs),
            short_rows=self._low_rank_rows(short, in_features, out_features) if short else None,
            kernel=kernel,
            down=down,
            up=up,
            in_scale=self._vector_rows([(r, s, e, x.in_scale) for r, s, e, x in here], in_features),
            out_scale=self._vector_rows([(r, s, e, x.out_scale) for r, s, e, x in here], out_features),
            shift=self._vector_rows([(r, s, e, x.shift) for r, s, e, x in here], out_features),
            pairs=tuple(
                PairRows(scale, group)
                for group in sorted({layout.pair_group for *_, layout in here if layout.pair_scale is not None})
                if (
                    scale := self._vector_rows(
                        [(r, s, e, x.pair_scale) for r, s, e, x in here if x.pair_group == group], out_features
                    )
                )
            ),
            loose=tuple(
                (start, end, {name: resident.extras[layout.extras[name]] for name in _LOOSE if name in layout.extras})
                for resident, start, end, layout in here
                if any(name in layout.extras for name in _LOOSE)
            ),
        )

    def _low_rank_rows(
        self, short: list[tuple[Resident, int, int, SiteLayout]], in_features: int, out_features: int
    ) -> LowRankRows:
        rows: list[int] = []
        downs: list[Tensor] = []
        ups: list[Tensor] = []
        ranks: list[int] = []
        program_of_row: list[int] = []
        programs: dict[int, int] = {}
        distinct: list[tuple[Tensor, Tensor]] = []
        for resident, start, end, layout in short:
            if resident.serial not in programs:
                programs[resident.serial] = len(distinct)
                steps = torch.arange(layout.rank)
                distinct.append(
                    (
                        steps + (resident.rows_offset + layout.down) // in_features,
                        steps + (resident.rows_offset + layout.up) // out_features,
                    )
                )
            which = programs[resident.serial]
            for row in range(start, end):
                rows.append(row)
                downs.append(distinct[which][0])
                ups.append(distinct[which][1])
                ranks.append(layout.rank)
                program_of_row.append(which)
        device = self._bank.rows.device
        rank_tensor = torch.tensor(ranks)
        offsets = torch.cumsum(rank_tensor, 0) - rank_tensor
        part_program = torch.repeat_interleave(torch.arange(len(distinct)), torch.tensor([down.shape[0] for down, _ in distinct]))
        return LowRankRows(
            rows=None if rows == list(range(self._num_rows)) else torch.tensor(rows, device=device),
            down=torch.cat(downs).to(device),
            up=torch.cat(ups).to(device),
            owner=torch.repeat_interleave(torch.arange(len(rows)), rank_tensor).to(device),
            offsets=offsets.to(device),
            first_down=torch.cat(downs)[offsets].to(device),
            first_up=torch.cat(ups)[offsets].to(device),
            ranks=rank_tensor.to(device),
            distinct_down=torch.cat([down for down, _ in distinct]).to(device),
            distinct_up=torch.cat([up for _, up in distinct]).to(device),
            member=(torch.tensor(program_of_row)[:, None] == part_program).to(device),
            rank=ranks[0] if len(set(ranks)) == 1 else 0,
        )

    def _vector_rows(self, found: list[tuple[Resident, int, int, int | None]], width: int) -> VectorRows | None:
        rows: list[int] = []
        starts: list[int] = []
        for resident, start, end, offset in found:
            if offset is not None:
                rows += range(start, end)
                starts += [resident.vectors_offset + offset] * (end - start)
        if not rows:
            return None
        device = self._bank.vectors.device
        return VectorRows(
            rows=None if rows == list(range(self._num_rows)) else torch.tensor(rows, device=device),
            index=torch.tensor(starts, device=device),
        )


class EditCache:
    """The last few StepEdits, by the programs and rows that they were built for."""

    def __init__(self, bank: Bank, *, capacity: int = 8, kernel: Kernel | None = None) -> None:
        self._bank = bank
        self._capacity = capacity
        self._kernel = kernel
        self._entries: OrderedDict[tuple[tuple[int, int, int], ...], StepEdits] = OrderedDict()

    def get(self, runs: Sequence[Run]) -> StepEdits | None:
        """The edits for these runs; None when they are all the base's, which takes the plain path."""
        if not any(slot for slot, _, _ in runs):
            return None
        # Slots are reused and serials are not: a key never outlives the program that it was made for.
        key = tuple((self._bank.resident(slot).serial if slot else 0, start, end) for slot, start, end in runs)
        edits = self._entries.pop(key, None) or StepEdits(self._bank, runs, self._kernel)
        self._entries[key] = edits
        if len(self._entries) > self._capacity:
            self._entries.popitem(last=False)
        return edits


def scale_rows(x: Tensor, vectors: Tensor, work: VectorRows) -> Tensor:
    """``x[row] * vector`` for the rows that have one, computed in the vectors' precision; other rows are passed through."""
    scales = _take(vectors, work, x.shape[-1])
    if work.rows is None:
        return (x * scales).to(x.dtype)
    return x.index_copy(0, work.rows, (x.index_select(0, work.rows) * scales).to(x.dtype))


def shift_rows(y: Tensor, vectors: Tensor, work: VectorRows) -> None:
    """``y[row] += vector`` in place."""
    shifts = _take(vectors, work, y.shape[-1]).to(y.dtype)
    if work.rows is None:
        y += shifts
    else:
        y.index_add_(0, work.rows, shifts)


def rotate_rows(x: Tensor, work: SiteWork) -> Tensor:
    """``x`` with the rotated rows replaced: every block of ``b`` inputs times its ``(b, b)`` matrix."""
    rotated = x.clone()
    for start, end, found in work.loose:
        if (rotation := found.get("rotation")) is not None:
            size = rotation.shape[-1]
            blocks = x[start:end].view(end - start, -1, size).transpose(0, 1)
            rotated[start:end] = torch.matmul(blocks, rotation).transpose(0, 1).reshape(end - start, -1)
    return rotated


def swap_pairs(z: Tensor, group: int) -> Tensor:
    """``(z1, z2) → (-z2, z1)`` for the halves of every ``group`` outputs."""
    first, second = z.view(*z.shape[:-1], -1, 2, group // 2).unbind(-2)
    return torch.stack((-second, first), dim=-2).view(z.shape)


def add_pairs(y: Tensor, z: Tensor, vectors: Tensor, pairs: PairRows) -> None:
    """``y[row] += pair_scale * swap(z[row])`` in place."""
    rows = pairs.scale.rows
    chosen = z if rows is None else z.index_select(0, rows)
    added = (swap_pairs(chosen, pairs.group) * _take(vectors, pairs.scale, z.shape[-1])).to(y.dtype)
    if rows is None:
        y += added
    else:
        y.index_add_(0, rows, added)


def add_linear_terms(y: Tensor, x: Tensor, work: SiteWork) -> None:
    """Every program's ``(x @ down.T) @ up + x @ dense.T + kron(left, right) x`` added to its rows of ``y``, in place."""
    for start, end, down, up in work.long_runs:
        y[start:end].addmm_(x[start:end] @ down.T, up)
    if work.short_rows is not None and work.down is not None and work.up is not None:
        work.kernel(y, x, work.down, work.up, work.short_rows)
    for start, end, found in work.loose:
        if "dense" in found:
            y[start:end].addmm_(x[start:end], found["dense"].T)
        if "left" in found:
            left, right = found["left"], found["right"]
            blocks = x[start:end].view(end - start, left.shape[1], right.shape[1])
            y[start:end] += torch.matmul(left, blocks @ right.T).reshape(end - start, -1)


def _take(vectors: Tensor, work: VectorRows, width: int) -> Tensor:
    """The vectors at ``index`` (element offsets): ``(rows, width)``."""
    return vectors[work.index[:, None] + torch.arange(width, device=vectors.device)]


__all__ = [
    "EditCache",
    "Run",
    "SiteWork",
    "StepEdits",
    "add_linear_terms",
    "add_pairs",
    "rotate_rows",
    "scale_rows",
    "shift_rows",
]
