"""Packing whole sequences into the tensors of one ragged batch ``[1, T]``. Knows sequences and shapes, no model and no edits.

A program's virtual tokens are rows of their sequence, with a token id that says nothing: what their embedding gives is replaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from server.adapters.packed import PrologueLayout
from server.adapters.rows import VirtualRows
from server.engine.sequence import Sequence


class Whole(NamedTuple):
    """A sequence to be run, and what its program starts it with."""

    sequence: Sequence
    prologue: PrologueLayout


@dataclass(frozen=True, slots=True)
class Span:
    """Rows ``[start, end)`` of one sequence, of which ``[virtual, virtual + num_virtual)`` are virtual tokens."""

    sequence: Sequence
    start: int
    end: int
    virtual: int
    num_virtual: int

    def tokens(self, hidden: Tensor) -> Tensor:
        """The rows of the sequence's own tokens: ``(n, width)``."""
        if not self.num_virtual:
            return hidden[self.start : self.end]
        return torch.cat([hidden[self.start : self.virtual], hidden[self.virtual + self.num_virtual : self.end]])


@dataclass(frozen=True, slots=True)
class Group:
    """``count`` neighbouring sequences of ``length`` rows each, from row ``start`` on; all of one program, in ``slot``."""

    start: int
    count: int
    length: int
    slot: int


@dataclass(frozen=True, slots=True)
class EncoderBatch:
    """One step's input: ``T`` rows. ``input_ids`` and ``positions``: int64 ``(T,)``; ``token_slots`` are (slot, start, end) runs over them."""

    spans: tuple[Span, ...]
    input_ids: Tensor
    positions: Tensor
    groups: tuple[Group, ...]
    token_slots: tuple[tuple[int, int, int], ...]

    @property
    def virtual_rows(self) -> Iterator[VirtualRows]:
        """The rows that are virtual tokens."""
        for span in self.spans:
            if span.num_virtual:
                yield VirtualRows(span.sequence.slot, span.virtual, span.virtual + span.num_virtual)

    def token_indices(self) -> list[int]:
        """Which of its sequence's real tokens each row is; negative for virtual tokens."""
        found: list[int] = []
        for span in self.spans:
            before, count = span.virtual - span.start, span.end - span.start - span.num_virtual
            found += [*range(before), *[-1] * span.num_virtual, *range(before, count)]
        return found


def pack_whole(sequences: Many[Whole], position_offset: int, device: torch.device) -> EncoderBatch:
    """Lay sequences side by side: those of one program together, and among them those of one length."""
    ordered = sorted(sequences, key=lambda item: (item.sequence.slot, item.sequence.num_tokens, item.sequence.order))
    input_ids: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    runs: list[tuple[int, int, int]] = []
    for sequence, prologue in ordered:
        start, count = len(input_ids), prologue.num_tokens
        before = int(prologue.after_first and count > 0)
        tokens = sequence.token_ids
        input_ids += [*tokens[:before], *[tokens[0]] * count, *tokens[before:]]
        positions += [position_offset + position for position in _positions(len(tokens), before, prologue)]
        span = Span(sequence, start, len(input_ids), start + before, count)
        spans.append(span)
        runs += _runs(span)
    return EncoderBatch(
        spans=tuple(spans),
        input_ids=torch.tensor(input_ids, device=device),
        positions=torch.tensor(positions, device=device),
        groups=tuple(_groups(spans)),
        token_slots=tuple(runs),
    )


def _positions(length: int, before: int, prologue: PrologueLayout) -> list[int]:
    """Virtual tokens take positions of their own where they shift the others; otherwise theirs say nothing."""
    shift = prologue.position_shift
    own = [index + (shift if index >= before else 0) for index in range(length)]
    virtual = [before + prologue.num_kv + index if prologue.shifts else 0 for index in range(prologue.num_tokens)]
    return [*own[:before], *virtual, *own[before:]]


def _runs(span: Span) -> Iterator[tuple[int, int, int]]:
    """The program's rows: all of them, or with a start of its own those from there on."""
    sequence = span.sequence
    if sequence.active_from == 0:
        yield sequence.slot, span.start, span.end
        return
    for slot, start, end in sequence.slots_between(0, len(sequence.token_ids)):
        yield slot, span.start + start, span.start + end


def _groups(spans: Many[Span]) -> Iterator[Group]:
    found: list[Group] = []
    for span in spans:
        slot, length = span.sequence.slot, span.end - span.start
        if found and (found[-1].slot, found[-1].length) == (slot, length):
            found[-1] = Group(found[-1].start, found[-1].count + 1, length, slot)
        else:
            found.append(Group(span.start, 1, length, slot))
    yield from found
