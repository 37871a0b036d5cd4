"""Attention of independent rows over the paged cache: what a kernel is given and what it means. Knows blocks, no sequence and no batch.

Every row sees the first ``length`` keys of its own sequence, its own key being the last: a decode row and a row of a prefill piece
look the same. No row reads what another sequence holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rules:
    """How a layer attends: scores are multiplied by ``scaling``, then squeezed into ``±softcap``; a row sees its last ``window`` keys.
    None: no cap, all keys."""

    scaling: float
    window: int | None = None
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Which keys the ``T`` rows of a step see, all int32. ``tables (sequences, blocks)``, padded with block 0; row ``i`` sees the first
    ``lengths[i]`` keys, at least one, of ``tables[sequence_of[i]]``. ``sequence_of`` and ``lengths`` are ``(T,)``."""

    tables: Tensor
    sequence_of: Tensor
    lengths: Tensor


class AttentionKernel(Protocol):
    """Fills ``out`` from ``query``, both ``(T, heads, head_dim)``, and one layer's caches ``(kv_heads, num_blocks, block_size, head_dim)``,
    which hold the rows' own keys and values already. Query head ``h`` uses K/V head ``h // (heads / kv_heads)``."""

    def __call__(
        self, out: Tensor, query: Tensor, key_cache: Tensor, value_cache: Tensor, rows: PagedRows, rules: Rules
    ) -> None: ...


def attention_reference(
    out: Tensor, query: Tensor, key_cache: Tensor, value_cache: Tensor, rows: PagedRows, rules: Rules
) -> None:
    """Row by row, exactly as the formula reads; the softmax in at least fp32."""
    kv_heads, _, block_size, width = key_cache.shape
    accumulate = torch.float64 if query.dtype == torch.float64 else torch.float32
    for row, (sequence, length) in enumerate(zip(rows.sequence_of.tolist(), rows.lengths.tolist(), strict=True)):
        first = 0 if rules.window is None else max(0, length - rules.window)
        table = rows.tables[sequence, : -(-length // block_size)].long()
        keys = key_cache[:, table].reshape(kv_heads, -1, width)[:, first:length].to(accumulate)
        values = value_cache[:, table].reshape(kv_heads, -1, width)[:, first:length].to(accumulate)
        grouped = query[row].view(kv_heads, -1, width).to(accumulate)
        scores = grouped @ keys.transpose(1, 2) * rules.scaling
        if rules.softcap is not None:
            scores = torch.tanh(scores / rules.softcap) * rules.softcap
        out[row] = (torch.softmax(scores, dim=-1) @ values).reshape(-1, width).to(out.dtype)
