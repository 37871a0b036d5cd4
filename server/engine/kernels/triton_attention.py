"""Paged attention on a GPU: online softmax over the blocks of a table, in grouped-query form. Needs triton, which comes with PyTorch there.

Neighbouring rows of one sequence, as in a piece of a prompt, share what is read of its keys and values; a decode row stands alone. A Triton
program finds its rows by itself in the index that all kernels are given: nothing is built on the host, and a launch depends on shapes alone.
The keys of decode rows are cut into parts of one size, whose results are joined afterwards, so that a few long sequences keep a GPU busy.

A row never reads another sequence's blocks. Within a piece, a later row's NaN can reach earlier ones, which fail with it anyway.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from server.adapters.kernels.triton_math import operand, tanh
from server.engine.kernels.paged import PagedRows, Rules

_QUERIES = 64
"""Query heads of neighbouring rows that one program serves, where rows of a sequence are neighbours."""
_FEWEST = 16
"""That tensor cores multiply."""
_KEYS = 64
_PART = 512
"""Keys of a part: it does not depend on the batch, nor does the order in which parts are joined."""


def attention_triton(out: Tensor, query: Tensor, key_cache: Tensor, value_cache: Tensor, rows: PagedRows, rules: Rules) -> None:
    """``attention_reference`` in fp16, bf16 or fp32, accumulated in fp32. Rows and heads may lie apart, the values of a head may not."""
    count, heads, width = query.shape
    kv_heads, _, block_size, _ = key_cache.shape
    group = heads // kv_heads
    is_decode = rows.tables.shape[0] == count
    tile = 1 if is_decode else max(1, _QUERIES // group)
    parts = triton.cdiv(rows.tables.shape[1] * block_size, _PART) if is_decode else 1
    if parts == 1:
        attended, bounds = out, None
    else:
        attended = torch.empty((count, heads, parts, width), dtype=torch.float32, device=query.device)
        bounds = torch.empty((count, heads, parts, 2), dtype=torch.float32, device=query.device)
    padded = triton.next_power_of_2(width)
    _attend[count, kv_heads, parts](
        attended,
        bounds,
        query,
        key_cache,
        value_cache,
        rows.tables,
        rows.sequence_of,
        rows.lengths,
        count,
        rows.tables.stride(0),
        query.stride(0),
        query.stride(1),
        attended.stride(0),
        attended.stride(1),
        key_cache.stride(0),
        value_cache.stride(0),
        rules.scaling,
        WINDOW=rules.window,
        SOFTCAP=rules.softcap,
        GROUP=group,
        WIDTH=width,
        BLOCK=block_size,
        PART=_PART if parts > 1 else None,
        TILE=tile,
        QUERIES=max(_FEWEST, triton.next_power_of_2(tile * group)),
        KEYS=_KEYS,
        COLUMNS=max(_FEWEST, padded),
        OPERAND=operand(query),
    )
    if bounds is not None:
        _join[count, heads](
            out,
            attended,
            bounds,
            rows.lengths,
            out.stride(0),
            out.stride(1),
            parts,
            WINDOW=rules.window,
            WIDTH=width,
            PART=_PART,
            COLUMNS=padded,
        )


@triton.jit(do_not_specialize=["count", "table_stride"])
def _attend(
    out, bounds, query, key_cache, value_cache, tables, sequence_of, lengths, count, table_stride,
    query_row, query_head, out_row, out_head, key_head, value_head, scaling,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
    TILE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, COLUMNS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """One K/V head's queries of up to ``TILE`` neighbouring rows of a sequence, over all their keys or over one part of them."""
    first, kv_head, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    sequence = tl.load(sequence_of + first)
    # Sequences are cut where rows are multiples of TILE; whoever is given the first row of a piece takes all of it.
    if first % TILE != 0 and tl.load(sequence_of + tl.maximum(first - 1, 0)) == sequence:
        return
    item = tl.arange(0, QUERIES)
    row = first + item // GROUP
    is_row = (item < TILE * GROUP) & (row < count) & (row // TILE == first // TILE)
    is_row = is_row & (tl.load(sequence_of + row, mask=is_row, other=-1) == sequence)
    length = tl.load(lengths + row, mask=is_row, other=0)
    start, end = 0, tl.max(length, axis=0)
    if WINDOW is not None:
        start = tl.maximum(tl.min(tl.where(is_row, length, end), axis=0) - WINDOW, 0) // KEYS * KEYS
    if PART is not None:
        start, end = tl.maximum(start, part * PART), tl.minimum(end, (part + 1) * PART)
        if start >= end:
            return

    column = tl.arange(0, COLUMNS)
    is_column = column < WIDTH
    head = kv_head * GROUP + item % GROUP
    is_query = is_row[:, None] & is_column[None, :]
    asked = tl.load(
        query + row.to(tl.int64)[:, None] * query_row + head[:, None] * query_head + column[None, :], mask=is_query, other=0.0
    )
    asked = asked.to(OPERAND)
    highest = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    attended = tl.zeros((QUERIES, COLUMNS), dtype=tl.float32)
    for begin in range(start, end, KEYS):
        key = begin + tl.arange(0, KEYS)
        is_key = key < end
        block = tl.load(tables + sequence.to(tl.int64) * table_stride + key // BLOCK, mask=is_key, other=0)
        place = (block.to(tl.int64) * BLOCK + key % BLOCK) * WIDTH
        keys = tl.load(
            key_cache + kv_head * key_head + place[None, :] + column[:, None],
            mask=is_column[:, None] & is_key[None, :],
            other=0.0,
        )
        scores = tl.dot(asked, keys.to(OPERAND), input_precision="ieee") * scaling
        if SOFTCAP is not None:
            scores = tanh(scores / SOFTCAP) * SOFTCAP
        sees = is_key[None, :] & (key[None, :] < length[:, None])
        if WINDOW is not None:
            sees = sees & (key[None, :] >= length[:, None] - WINDOW)
        scores = tl.where(sees, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        # A row that has seen no key yet has no highest score to subtract.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        kept, weight = tl.exp(highest - base), tl.exp(scores - base[:, None])
        values = tl.load(
            value_cache + kv_head * value_head + place[:, None] + column[None, :],
            mask=is_key[:, None] & is_column[None, :],
            other=0.0,
        )
        weighted = tl.dot(weight.to(value_cache.dtype.element_ty).to(OPERAND), values.to(OPERAND), input_precision="ieee")
        total = total * kept + tl.sum(weight, axis=1)
        attended = attended * kept[:, None] + weighted
        highest = higher
    if PART is None:
        attended = attended / total[:, None]
        target = out + row.to(tl.int64)[:, None] * out_row + head[:, None] * out_head + column[None, :]
    else:
        place = row.to(tl.int64) * out_row + head * out_head + part * WIDTH
        target = out + place[:, None] + column[None, :]
        pair = bounds + place // WIDTH * 2
        tl.store(pair, highest, mask=is_row)
        tl.store(pair + 1, total, mask=is_row)
    tl.store(target, attended.to(out.dtype.element_ty), mask=is_query)


@triton.jit(do_not_specialize=["parts"])
def _join(
    out, attended, bounds, lengths, out_row, out_head, parts,
    WINDOW: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The softmax of one row and head over all its keys, from those of their parts."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + row)
    first = 0
    if WINDOW is not None:
        first = tl.maximum(length - WINDOW, 0) // PART
    column = tl.arange(0, COLUMNS)
    is_column = column < WIDTH
    highest, total = float("-inf"), 0.0
    sums = tl.zeros((COLUMNS,), dtype=tl.float32)
    start = (row * tl.num_programs(1) + head) * parts
    for part in range(first, tl.cdiv(length, PART)):
        high, share = tl.load(bounds + (start + part) * 2), tl.load(bounds + (start + part) * 2 + 1)
        values = tl.load(attended + (start + part) * WIDTH + column, mask=is_column, other=0.0)
        higher = tl.maximum(highest, high)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        kept, taken = tl.exp(highest - base), tl.exp(high - base)
        total = total * kept + share * taken
        sums = sums * kept + values * taken
        highest = higher
    tl.store(out + row * out_row + head * out_head + column, (sums / total).to(out.dtype.element_ty), mask=is_column)
