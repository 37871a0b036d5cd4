"""Attention over the paged cache, as one function in Hugging Face's AttentionInterface.

The models stay unmodified: they hand over rotated queries, keys and values of the ragged batch ``[1, heads, T, head_dim]``; this
module stores K/V, has a kernel attend, and adds what programs attend to on the side.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from server.adapters.sites import SiteState
from server.engine.batch import Batch
from server.engine.kernels import AttentionKernel, Rules
from server.engine.kernels.native import StepRows
from server.engine.kv_cache import KVCache

NAME = "medley_paged"

# What models pass along that has no bearing here: positions are already in the queries, causality is ours.
_WITHOUT_EFFECT = frozenset({"position_ids", "is_causal", "use_cache", "cache_position", "output_attentions"})


class AttentionState:
    """The step that is being run, the cache it runs on and the kernel that attends; one per model.

    ``rows`` is what native blocks made of the step, for the layers that come after the first.
    """

    __slots__ = ("_batch", "cache", "kernel", "rows", "sites")

    def __init__(self, cache: KVCache, sites: SiteState, kernel: AttentionKernel) -> None:
        self.cache = cache
        self.sites = sites
        self.kernel = kernel
        self.rows: StepRows | None = None
        self._batch: Batch | None = None

    @property
    def batch(self) -> Batch:
        """The running step's. Raises RuntimeError outside a step."""
        if self._batch is None:
            raise RuntimeError("attention ran outside a step")
        return self._batch

    def bind(self, batch: Batch) -> None:
        """Begin a step. Raises RuntimeError while another is running."""
        if self._batch is not None:
            raise RuntimeError("a step is already running on this model")
        self._batch = batch

    def unbind(self) -> None:
        """End the step."""
        self._batch = self.rows = None

    def at(self, layer: int, site: str, output: str) -> AttentionPlace:
        """The state as one attention module sees it: its layer, and the names of its site and of the linear after it."""
        return AttentionPlace(self, layer, site, output)


class AttentionPlace(NamedTuple):
    """What an attention module needs beside its arguments; set on each of them."""

    state: AttentionState
    layer: int
    site: str
    output: str

    def attend(self, query: Tensor, rules: Rules) -> Tensor:
        """What the rows' queries ``(T, heads, head_dim)`` find in the cache, which holds their own keys and values already."""
        state = self.state
        out = torch.empty_like(query)
        state.kernel(out, query, *state.cache.layer(self.layer), state.batch.paged, rules)
        edits = state.sites.edits
        if edits is not None:
            for start, end, found in edits.extras(self.site, "side"):
                attended = _attend_side(query[start:end].transpose(0, 1), found["key"], found["value"]).transpose(0, 1)
                if found["projected"]:
                    out[start:end] += attended
                else:
                    state.sites.side.setdefault(self.output, []).append((start, end, attended.reshape(end - start, -1)))
        return out


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
    state.cache.write(place.layer, state.batch.kv_slots, key[0], value[0])
    rows = query[0].transpose(0, 1).contiguous()
    return place.attend(rows, Rules(scaling, sliding_window, softcap)).unsqueeze(0), None


def _attend_side(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Queries over keys and values that every row sees. ``query (heads, n, d)``, ``key``, ``value (length, kv_heads, d)`` → ``(heads, n, d)``."""
    heads, count, width = query.shape
    grouped = query.reshape(key.shape[1], -1, width)
    scores = torch.matmul(grouped, key.permute(1, 2, 0)) / math.sqrt(width)
    accumulate = scores.dtype if scores.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=accumulate).to(scores.dtype)
    return torch.matmul(weights, value.transpose(0, 1)).view(heads, count, width)


AttentionInterface.register(NAME, paged_attention)
