"""Attention of whole sequences side by side, as one function in Hugging Face's AttentionInterface.

Every row sees all rows of its own sequence and nothing else. Sequences of one length are stacked and attend together, so that there
is no padding and no mask: a neighbour cannot be reached.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from server.engine.encoder_batch import EncoderBatch

NAME = "medley_whole"

# What models pass along that has no bearing here: positions are in the embeddings already.
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "use_cache", "output_attentions", "encoder_hidden_states", "past_key_values", "is_causal"}
)


class EncoderState:
    """The step that is being run; one per model, set on each attention module. ``kv`` maps a slot to the keys and values that its
    sequences start with, ``(layers, 2, kv_heads, length, head_dim)``."""

    __slots__ = ("batch", "kv")

    def __init__(self) -> None:
        self.batch: EncoderBatch | None = None
        self.kv: dict[int, Tensor] = {}


def whole_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence: ``(1, heads, T, head_dim)`` each, returns ``(1, T, heads, head_dim)``.

    Raises TypeError for arguments that it does not implement: ignoring one would change the model silently.
    """
    unknown = sorted(name for name, item in kwargs.items() if item is not None and name not in _WITHOUT_EFFECT)
    if unknown or attention_mask is not None or dropout or kwargs.get("is_causal"):
        raise TypeError(f"attention of whole sequences does not implement {unknown or 'masks, causality and dropout'}")
    state: EncoderState = module.medley_attention  # type: ignore[assignment]
    layer: int = module.medley_layer  # type: ignore[assignment]
    if state.batch is None:
        raise RuntimeError("attention ran outside a step")
    out = torch.empty_like(query[0].transpose(0, 1))
    for group in state.batch.groups:
        rows = slice(group.start, group.start + group.count * group.length)
        q, k, v = (_stack(states[0, :, rows], group.count, group.length) for states in (query, key, value))
        if (prefix := state.kv.get(group.slot)) is not None:
            k, v = (
                torch.cat([given.expand(group.count, *given.shape), own], dim=2)
                for given, own in zip(prefix[layer], (k, v), strict=True)
            )
        attended = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        out[rows] = attended.transpose(1, 2).reshape(-1, *out.shape[1:])
    return out[None], None


def _stack(states: Tensor, count: int, length: int) -> Tensor:
    """``(heads, count * length, d)`` → ``(count, heads, length, d)``."""
    return states.view(states.shape[0], count, length, -1).transpose(0, 1)


AttentionInterface.register(NAME, whole_attention)
