"""Decode steps that are recorded once and replayed: on a GPU the host would take longer to launch a small batch's kernels than they run.

A recording serves every step of as many rows and blocks, rounded up, whose programs have the same terms. What differs between such steps
lies in tensors that stay where they are and are filled before each replay: tokens, positions, block tables, and the rows' slots. Rows that
fill a step up belong to the base and write to a block that nobody holds. Steps that nothing was recorded for, and those with a term that
kernels do not find by slot, run as usual.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from server.adapters.apply import EditCache, StepEdits
from server.adapters.bank import COMPUTE_ERRORS
from server.adapters.slot_table import Term
from server.engine.batch import Batch
from server.engine.kernels import PagedRows
from server.engine.kernels.graph import Graph

AFTER = 3
"""Steps of a kind that run as usual before one is recorded: kinds that come once cost nothing. Twice as many for each time that the kind's
recording went before."""
MOST = 128
"""Recordings at a time; the one that was replayed longest ago goes."""
MOST_REFUSED = 8
"""Kinds that could not be recorded; after so many nothing is recorded any more."""
_MOST_SEEN = 4096
_FEWEST_BLOCKS = 32

log = logging.getLogger(__name__)

Forward = Callable[[Batch, StepEdits | None, StepEdits | None], tuple[Tensor, Tensor]]
"""A step's hidden states ``(T, hidden)`` and logits ``(S, vocab)``, from its batch, its edits and those of its sampled rows."""


@dataclass(frozen=True, slots=True)
class GraphLimits:
    """``spare_block`` is a block of the cache beyond those that are given out."""

    max_rows: int
    max_blocks: int
    block_size: int
    spare_block: int


class _Kind(NamedTuple):
    """Steps of one kind launch the same kernels. ``blocks``: the width of their tables; the others: see SlotStep."""

    rows: int
    blocks: int
    terms: frozenset[Term] = frozenset()
    rank: int = 0
    inner: int = 0


class DecodeGraphs:
    """The recordings of one model's decode steps, which ``forward`` runs. Not for use outside inference mode."""

    def __init__(
        self, forward: Forward, edits: EditCache, limits: GraphLimits, make_graph: Callable[[], Graph], device: torch.device
    ) -> None:
        self._forward = forward
        self._edits = edits
        self._limits = limits
        self._make_graph = make_graph
        self._recorded: OrderedDict[_Kind, Graph] = OrderedDict()
        # By hash, since terms are large and tenants choose them: where two kinds share one, one of them is recorded early, or never.
        self._seen: Counter[int] = Counter()
        self._went: Counter[int] = Counter()
        self._refused: set[int] = set()
        self._results: tuple[Tensor, Tensor] | None = None

        def whole(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rows, short = limits.max_rows, torch.int32
        self._input_ids, self._positions, self._kv_slots = whole(rows), whole(rows), whole(rows)
        self._tables, self._lengths = whole(rows, limits.max_blocks, dtype=short), whole(rows, dtype=short)
        self._slots = whole(rows, dtype=short)
        self._each = torch.arange(rows, device=device)
        self._each_short = self._each.to(short)

    @property
    def num_recorded(self) -> int:
        return len(self._recorded)

    def run(self, batch: Batch, edits: StepEdits | None) -> tuple[Tensor, Tensor] | None:
        """What ``forward`` gives for a step, valid until the next one; None: nothing is recorded for it."""
        kind = self._kind(batch, edits)
        if kind is None:
            return None
        graph = self._recorded.get(kind)
        if graph is None and not self._is_due(kind):
            return None
        self._fill(batch, edits, kind.rows)
        graph = graph or self._record(kind, batch)
        if graph is None:
            return None
        self._recorded.move_to_end(kind)
        graph.replay()
        assert self._results is not None, "recorded"
        count = batch.input_ids.shape[0]
        return self._results[0][:count], self._results[1][:count]

    def _kind(self, batch: Batch, edits: StepEdits | None) -> _Kind | None:
        """None: the step is not one that can be recorded."""
        count, blocks = batch.input_ids.shape[0], batch.paged.tables.shape[1]
        is_decode = batch.paged.tables.shape[0] == count == batch.sample_rows.shape[0] and not batch.virtual_rows
        step = None if edits is None else edits.slots
        if not is_decode or (edits is not None and (step is None or not step.is_whole)):
            return None
        rows = min(_rounded(count), self._limits.max_rows)
        width = min(max(_FEWEST_BLOCKS, 1 << (blocks - 1).bit_length()), self._limits.max_blocks)
        if rows < count or width < blocks:
            return None
        return _Kind(rows, width) if step is None else _Kind(rows, width, step.terms, step.rank, step.inner)

    def _is_due(self, kind: _Kind) -> bool:
        """Whether a kind that has come once more is to be recorded now."""
        name = hash(kind)
        if len(self._seen) > _MOST_SEEN:
            self._seen.clear()
            self._went.clear()
        self._seen[name] += 1
        is_refused = name in self._refused or len(self._refused) >= MOST_REFUSED
        return not is_refused and self._seen[name] > AFTER << self._went[name]

    def _fill(self, batch: Batch, edits: StepEdits | None, rows: int) -> None:
        """Bring a step to where recordings read it. Past a row's length its table is not read, so that it may hold anything there."""
        spare, step = self._limits.spare_block, None if edits is None else edits.slots
        _put(self._input_ids, batch.input_ids, rows, 0)
        _put(self._positions, batch.positions, rows, 0)
        _put(self._kv_slots, batch.kv_slots, rows, spare * self._limits.block_size)
        _put(self._tables[:, : batch.paged.tables.shape[1]], batch.paged.tables, rows, spare)
        _put(self._lengths, batch.paged.lengths, rows, 1)
        if step is not None:
            _put(self._slots, step.slots, rows, 0)

    def _record(self, kind: _Kind, batch: Batch) -> Graph | None:
        """The recording of a step that has been filled in; None, and none of its kind ever after: it was refused."""
        count, rows = batch.input_ids.shape[0], kind.rows
        static = Batch(
            items=(),
            input_ids=self._input_ids[:rows],
            positions=self._positions[:rows],
            kv_slots=self._kv_slots[:rows],
            paged=PagedRows(self._tables[:rows, : kind.blocks], self._each_short[:rows], self._lengths[:rows]),
            token_slots=(),
            sample_slots=(),
            sample_rows=self._each[:rows],
            item_samples=(),
            copies=(),
            virtual_rows=(),
        )
        edits = self._edits.lasting([*batch.token_slots, (0, count, rows)], self._slots[:rows]) if kind.terms else None

        def compute() -> None:
            found = self._forward(static, edits, edits)
            if self._results is None:
                # All recordings leave their results in the same place, so that they can share the memory of everything before.
                hidden, logits = (item.new_empty(self._limits.max_rows, item.shape[1]) for item in found)
                self._results = hidden, logits
            for result, item in zip(self._results, found, strict=True):
                result[:rows].copy_(item)

        graph = self._make_graph()
        try:
            graph.record(compute)
        except COMPUTE_ERRORS:
            log.exception("steps of %d rows and %d terms cannot be recorded; they run kernel by kernel", rows, len(kind.terms))
            self._refused.add(hash(kind))
            return None
        log.info("recorded decode steps of %d rows, %d blocks and %d terms", rows, kind.blocks, len(kind.terms))
        self._recorded[kind] = graph
        if len(self._recorded) > MOST:
            gone, _ = self._recorded.popitem(last=False)
            self._seen[hash(gone)] = 0
            self._went[hash(gone)] += 1
        return graph


def _rounded(count: int) -> int:
    """1, 2, 4, 8, and then multiples of 8."""
    return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8


def _put(place: Tensor, values: Tensor, rows: int, rest: int) -> None:
    """``values`` are the first rows of a place, and ``rest`` fills it up to ``rows``."""
    count = values.shape[0]
    place[:count].copy_(values)
    if count < rows:
        place[count:rows].fill_(rest)
