"""Attention over the paged cache, as one function in Hugging Face's AttentionInterface.

The models stay unmodified: they hand over rotated queries, keys and values of the ragged batch ``[1, heads, T, head_dim]``; this
module stores K/V, and lets every row see its own sequence's keys only. Masks select, they never multiply.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from server.adapters.sites import SiteState
from server.engine.batch import Batch, DecodeGroup, PrefillPiece
from server.engine.kv_cache import KVCache

NAME = "medley_paged"

# What models pass along that has no bearing here: positions are already in the queries, causality is ours.
_WITHOUT_EFFECT = frozenset({"position_ids", "is_causal", "use_cache", "cache_position", "output_attentions"})


class AttentionState:
    """The step that is being run and the cache it runs on; one per model."""

    __slots__ = ("batch", "cache", "sites")

    def __init__(self, cache: KVCache, sites: SiteState) -> None:
        self.cache = cache
        self.sites = sites
        self.batch: Batch | None = None

    def at(self, site: str, output: str) -> AttentionPlace:
        """The state as one attention module sees it: the names of its site and of the linear after it."""
        return AttentionPlace(self, site, output)


class AttentionPlace(NamedTuple):
    """What an attention module needs beside its arguments; set on each of them."""

    state: AttentionState
    site: str
    output: str


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over the paged cache. Returns ``(1, T, heads, head_dim)``.

    Raises TypeError for arguments that it does not implement: ignoring one would change the model silently.
    """
    unknown = sorted(name for name, item in kwargs.items() if item is not None and name not in _WITHOUT_EFFECT)
    if unknown or attention_mask is not None or dropout:
        raise TypeError(f"paged attention does not implement {unknown or 'masks and dropout'}")
    place: AttentionPlace = module.medley_attention  # type: ignore[assignment]
    state = place.state
    layer: int = module.layer_idx  # type: ignore[assignment]
    if state.batch is None:
        raise RuntimeError("attention ran outside a step")
    state.cache.write(layer, state.batch.kv_slots, key[0], value[0])
    out = torch.empty_like(query[0])
    rules = _Rules(scaling, sliding_window, softcap)
    for group in state.batch.decodes:
        rows = query[0] if group.rows is None else query[0].index_select(1, group.rows)
        attended = _attend_decodes(rows, group, *state.cache.gather(layer, group.tables), rules)
        if group.rows is None:
            out = attended
        else:
            out.index_copy_(1, group.rows, attended)
    for piece in state.batch.prefills:
        keys, values = state.cache.gather(layer, piece.table)
        out[:, piece.start : piece.end] = _attend_prefill(query[0, :, piece.start : piece.end], piece, keys, values, rules)
    edits = state.sites.edits
    if edits is not None:
        for start, end, found in edits.extras(place.site, "side"):
            attended = _attend_side(query[0, :, start:end], found["key"], found["value"])
            if found["projected"]:
                out[:, start:end] += attended
            else:
                rows = attended.transpose(0, 1).reshape(end - start, -1)
                state.sites.side.setdefault(place.output, []).append((start, end, rows))
    return out.transpose(0, 1).unsqueeze(0), None


class _Rules:
    __slots__ = ("scaling", "softcap", "window")

    def __init__(self, scaling: float, window: int | None, softcap: float | None) -> None:
        self.scaling = scaling
        self.window = window
        self.softcap = softcap


def _attend_decodes(query: Tensor, group: DecodeGroup, keys: Tensor, values: Tensor, rules: _Rules) -> Tensor:
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


def _attend_prefill(query: Tensor, piece: PrefillPiece, keys: Tensor, values: Tensor, rules: _Rules) -> Tensor:
    """Consecutive queries of one sequence. ``query (heads, n, d)``, ``keys (kv_heads, L, d)`` → ``(heads, n, d)``."""
    heads, count, width = query.shape
    keys, values = keys[:, : piece.kv_length], values[:, : piece.kv_length]
    whole = count == piece.kv_length
    if rules.softcap is None and (rules.window is None or piece.kv_length <= rules.window):
        mask = None if whole else ~_hidden(piece, count, None, query.device)
        return F.scaled_dot_product_attention(
            query[None], keys[None], values[None], attn_mask=mask, is_causal=whole, scale=rules.scaling, enable_gqa=True
        )[0]
    grouped = query.reshape(keys.shape[0], -1, width)
    scores = (torch.matmul(grouped, keys.transpose(-1, -2)) * rules.scaling).view(heads, count, piece.kv_length)
    scores = _cap(scores, rules.softcap).masked_fill(_hidden(piece, count, rules.window, query.device), float("-inf"))
    attended = torch.matmul(_softmax(scores).view(keys.shape[0], -1, piece.kv_length), values)
    return attended.view(heads, count, width)


def _attend_side(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Queries over keys and values that every row sees. ``query (heads, n, d)``, ``key``, ``value (length, kv_heads, d)`` → ``(heads, n, d)``."""
    heads, count, width = query.shape
    grouped = query.reshape(key.shape[1], -1, width)
    scores = torch.matmul(grouped, key.permute(1, 2, 0)) / math.sqrt(width)
    return torch.matmul(_softmax(scores), value.transpose(0, 1)).view(heads, count, width)


def _hidden(piece: PrefillPiece, count: int, window: int | None, device: torch.device) -> Tensor:
    """True where query ``i`` must not see key ``j``: ``(count, kv_length)``."""
    at = torch.arange(piece.kv_length - count, piece.kv_length, device=device)[:, None]
    key = torch.arange(piece.kv_length, device=device)
    hidden = key > at
    return hidden if window is None else hidden | (key <= at - window)


def _cap(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _softmax(scores: Tensor) -> Tensor:
    """Softmax in at least fp32, returned in the scores' dtype."""
    accumulate = scores.dtype if scores.dtype == torch.float64 else torch.float32
    return torch.softmax(scores, dim=-1, dtype=accumulate).to(scores.dtype)


AttentionInterface.register(NAME, paged_attention)
