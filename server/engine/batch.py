"""Packing scheduled tokens into the tensors of one ragged batch ``[1, T]``. Knows sequences and shapes, no model and no edits.

Rows are ordered decodes first (by slot), then longer pieces: rows of one slot lie together, and so do the single-token rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.rows import VirtualRows
from server.engine.block_manager import NULL_BLOCK
from server.engine.kernels import PagedRows
from server.engine.scheduler import Scheduled


@dataclass(frozen=True, slots=True)
class PrefixCopy:
    """Entries ``[first, end)`` of the K/V that the slot's program starts with go to ``kv_slots (end - first,)``."""

    slot: int
    first: int
    end: int
    kv_slots: Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input. ``T`` tokens, ``S`` sampled rows.

    ``input_ids``, ``positions``, ``kv_slots``: int64 ``(T,)``. ``paged``: the keys that each row sees. ``token_slots`` and ``sample_slots``
    are (slot, start, end) runs over the T token rows and the S sampled rows. ``sample_rows (S,)`` selects from the token rows;
    ``item_samples[i]`` is how many of them belong to ``items[i]``; its last one makes the next token where ``items[i].samples``.
    ``copies`` and ``virtual_rows`` are what programs start with.
    """

    items: tuple[Scheduled, ...]
    input_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    paged: PagedRows
    token_slots: tuple[tuple[int, int, int], ...]
    sample_slots: tuple[tuple[int, int, int], ...]
    sample_rows: Tensor
    item_samples: tuple[int, ...]
    copies: tuple[PrefixCopy, ...]
    virtual_rows: tuple[VirtualRows, ...]

    def token_indices(self) -> list[int]:
        """Which of its sequence's real tokens each row is; negative for virtual tokens."""
        return [index - item.sequence.num_prologue for item in self.items for index in range(item.start, item.start + item.count)]


def pack(scheduled: Sequence[Scheduled], block_size: int, device: torch.device) -> Batch:
    """Lay the tokens of a step, or of a part of it, side by side."""
    items = sorted(scheduled, key=lambda item: (item.count > 1, item.sequence.slot, item.sequence.order))
    input_ids: list[int] = []
    positions: list[int] = []
    kv_slots: list[int] = []
    sample_rows: list[int] = []
    item_samples: list[int] = []
    token_runs: list[tuple[int, int, int]] = []
    sample_runs: list[tuple[int, int, int]] = []
    tables: list[list[int]] = []
    lengths: list[int] = []
    copies: list[PrefixCopy] = []
    virtual_rows: list[VirtualRows] = []
    for item in items:
        sequence, first, end = item.sequence, item.start, item.start + item.count
        row = len(input_ids)
        input_ids += sequence.tokens_between(first, end)
        positions += sequence.positions_between(first, end)
        table = sequence.block_table
        kv_slots += _kv_slots(table, range(first, end), block_size)
        if copied := item.copied(block_size):
            places = torch.tensor(_kv_slots(table, copied, block_size), device=device)
            copies.append(PrefixCopy(sequence.slot, copied.start, copied.stop, places))
        if first < sequence.num_prologue:
            behind, offset = min(end, sequence.num_prologue), first - sequence.num_prologue_kv
            virtual_rows.append(VirtualRows(sequence.slot, row, row + behind - first, offset))
        token_runs += [
            (slot, row + start - first, row + stop - first) for slot, start, stop in sequence.slots_between(first, end)
        ]
        wanted = _sampled_positions(item)
        sample_runs += [
            (next(sequence.slots_between(index, index + 1))[0], len(sample_rows) + offset, len(sample_rows) + offset + 1)
            for offset, index in enumerate(wanted)
        ]
        sample_rows += [row + index - first for index in wanted]
        item_samples.append(len(wanted))
        tables.append(table[: -(-end // block_size)])
        lengths += range(first + 1, end + 1)
    return Batch(
        items=tuple(items),
        input_ids=torch.tensor(input_ids, device=device),
        positions=torch.tensor(positions, device=device),
        kv_slots=torch.tensor(kv_slots, device=device),
        paged=_paged([item.count for item in items], tables, lengths, device),
        token_slots=_merge(token_runs),
        sample_slots=_merge(sample_runs),
        sample_rows=torch.tensor(sample_rows, dtype=torch.int64, device=device),
        item_samples=tuple(item_samples),
        copies=tuple(copies),
        virtual_rows=tuple(virtual_rows),
    )


def _kv_slots(table: list[int], indices: range, block_size: int) -> list[int]:
    return [table[index // block_size] * block_size + index % block_size for index in indices]


def _sampled_positions(item: Scheduled) -> list[int]:
    """Token positions whose logits are wanted: the last one, and the prompt's where its log-probabilities are asked for."""
    end = item.start + item.count
    last = [end - 1] if item.samples else []
    if not item.sequence.wants_prompt_logprobs:
        return last
    first = max(item.start, item.sequence.num_prologue)
    return list(range(first, min(end, item.sequence.num_prompt - 1))) + last


def _paged(counts: list[int], tables: list[list[int]], lengths: list[int], device: torch.device) -> PagedRows:
    longest = max(map(len, tables))
    padded = [table + [NULL_BLOCK] * (longest - len(table)) for table in tables]
    sequence_of = [sequence for sequence, count in enumerate(counts) for _ in range(count)]
    return PagedRows(*(torch.tensor(values, dtype=torch.int32, device=device) for values in (padded, sequence_of, lengths)))


def _merge(runs: list[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Join neighbouring runs of the same slot."""
    merged: list[tuple[int, int, int]] = []
    for slot, start, end in runs:
        if merged and merged[-1][0] == slot and merged[-1][2] == start:
            merged[-1] = (slot, merged[-1][1], end)
        else:
            merged.append((slot, start, end))
    return tuple(merged)
