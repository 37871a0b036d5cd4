"""Attention in PyTorch's operations, on keys and values gathered from their blocks: wherever no kernel reads them in place.

Single rows of similar context length go together, the consecutive rows of a sequence as one piece. Masks select, they never multiply.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from server.engine.kernels.paged import PagedRows, Rules


@dataclass(frozen=True, slots=True)
class _Singles:
    """Rows ``(B,)`` that are alone in their sequences, with ``tables (B, blocks)`` and ``lengths (B,)``. ``rows`` None: all, in order."""

    rows: Tensor | None
    tables: Tensor
    lengths: Tensor


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows ``[start, end)``: consecutive tokens of one sequence. ``table (blocks,)`` covers ``length`` keys, those of the last row."""

    start: int
    end: int
    length: int
    table: Tensor


class GatheredAttention:
    """An AttentionKernel. What it makes of a step's rows is kept for the step's other layers."""

    def __init__(self) -> None:
        self._planned: PagedRows | None = None
        self._singles: list[_Singles] = []
        self._pieces: list[_Piece] = []

    def __call__(self, out: Tensor, query: Tensor, key_cache: Tensor, value_cache: Tensor, rows: PagedRows, rules: Rules) -> None:
        if self._planned is not rows:
            self._plan(rows, key_cache.shape[2])
        heads = query.transpose(0, 1)
        for group in self._singles:
            chosen = heads if group.rows is None else heads.index_select(1, group.rows)
            keys, values = _gather(key_cache, group.tables), _gather(value_cache, group.tables)
            attended = _attend_singles(chosen, group, keys, values, rules).transpose(0, 1)
            if group.rows is None:
                out.copy_(attended)
            else:
                out.index_copy_(0, group.rows, attended)
        for piece in self._pieces:
            keys, values = _gather(key_cache, piece.table), _gather(value_cache, piece.table)
            attended = _attend_piece(heads[:, piece.start : piece.end], piece, keys, values, rules)
            out[piece.start : piece.end] = attended.transpose(0, 1)

    def _plan(self, rows: PagedRows, block_size: int) -> None:
        singles: list[tuple[int, int, int]] = []
        self._pieces = []
        sequences, lengths = rows.sequence_of.tolist(), rows.lengths.tolist()
        start = 0
        for row in range(1, len(sequences) + 1):
            if row < len(sequences) and sequences[row] == sequences[start]:
                continue
            sequence, length = sequences[start], lengths[row - 1]
            if row - start == 1:
                singles.append((start, sequence, length))
            else:
                self._pieces.append(_Piece(start, row, length, rows.tables[sequence, : -(-length // block_size)].long()))
            start = row
        self._singles = list(_groups(singles, rows, block_size))
        self._planned = rows


def _groups(singles: list[tuple[int, int, int]], rows: PagedRows, block_size: int) -> Iterator[_Singles]:
    """Group rows so that the padding of block tables at most doubles the work: by the power of two above their length."""
    buckets: dict[int, list[tuple[int, int, int]]] = {}
    for single in singles:
        buckets.setdefault((-(-single[2] // block_size) - 1).bit_length(), []).append(single)
    device = rows.tables.device
    for _, members in sorted(buckets.items()):
        longest = max(-(-length // block_size) for _, _, length in members)
        numbers = [row for row, _, _ in members]
        yield _Singles(
            rows=None if numbers == list(range(len(rows.lengths))) else torch.tensor(numbers, device=device),
            tables=rows.tables[torch.tensor([sequence for _, sequence, _ in members], device=device), :longest].long(),
            lengths=torch.tensor([length for _, _, length in members], device=device),
        )


def _gather(cache: Tensor, tables: Tensor) -> Tensor:
    """The entries of block tables ``(…, blocks)`` in ``cache (kv_heads, num_blocks, block_size, d)``: ``(kv_heads, …, blocks * block_size, d)``."""
    heads, _, block_size, width = cache.shape
    shape = (heads, *tables.shape[:-1], tables.shape[-1] * block_size, width)
    return cache.flatten(2).index_select(1, tables.reshape(-1)).view(shape)


def _attend_singles(query: Tensor, group: _Singles, keys: Tensor, values: Tensor, rules: Rules) -> Tensor:
    """One query per row in grouped-query form. ``query (heads, B, d)``, ``keys (kv_heads, B, L, d)`` → ``(heads, B, d)``."""
    heads, rows, width = query.shape
    kv_heads, length = keys.shape[0], keys.shape[2]
    grouped = query.view(kv_heads, heads // kv_heads, rows, width).transpose(1, 2)
    scores = _cap(torch.matmul(grouped, keys.transpose(-1, -2)) * rules.scaling, rules.softcap)
    index = torch.arange(length, device=query.device)
    hidden = index >= group.lengths[:, None]
    if rules.window is not None:
        hidden |= index <= (group.lengths - 1 - rules.window)[:, None]
    scores = scores.masked_fill(hidden[:, None, :], float("-inf"))
    attended = torch.matmul(_softmax(scores), values)
    return attended.transpose(1, 2).reshape(heads, rows, width)


def _attend_piece(query: Tensor, piece: _Piece, keys: Tensor, values: Tensor, rules: Rules) -> Tensor:
    """Consecutive queries of one sequence. ``query (heads, n, d)``, ``keys (kv_heads, L, d)`` → ``(heads, n, d)``."""
    heads, count, width = query.shape
    keys, values = keys[:, : piece.length], values[:, : piece.length]
    whole = count == piece.length
    if rules.softcap is None and (rules.window is None or piece.length <= rules.window):
        mask = None if whole else ~_hidden(piece, count, None, query.device)
        return F.scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=mask, is_causal=whole, scale=rules.scaling, enable_gqa=True
        )[0]
    grouped = query.reshape(keys.shape[0], -1, width)
    scores = (torch.matmul(grouped, keys.transpose(-1, -2)) * rules.scaling).view(heads, count, piece.length)
    scores = _cap(scores, rules.softcap).masked_fill(_hidden(piece, count, rules.window, query.device), float("-inf"))
    attended = torch.matmul(_softmax(scores).view(keys.shape[0], -1, piece.length), values)
    return attended.view(heads, count, width)


def _hidden(piece: _Piece, count: int, window: int | None, device: torch.device) -> Tensor:
    """True where query ``i`` must not see key ``j``: ``(count, length)``."""
    at = torch.arange(piece.length - count, piece.length, device=device)[:, None]
    key = torch.arange(piece.length, device=device)
    hidden = key > at
    return hidden if window is None else hidden | (key <= at - window)


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _softmax(scores: Tensor) -> Tensor:
    """Softmax in at least fp32, returned in the scores' dtype."""
    accumulate = scores.dtype if scores.dtype == torch.float64 else torch.float32
    return torch.softmax(scores, dim=-1, dtype=accumulate).to(scores.dtype)
