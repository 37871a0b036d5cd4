"""Modules of a model on native kernels, in place of Hugging Face's own: the same parameters, children and results, fewer operations.

Children keep their names, so that sites attach where they always do. Which classes have a counterpart here is ``swap``'s business.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from server.engine.attention import AttentionPlace
from server.engine.kernels.native import Native
from server.engine.kernels.paged import Rules


class PackedLinear(nn.Module):
    """A linear of ``weight (out, in)``, which is kept in the kernel's order only."""

    def __init__(self, native: Native, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Plain attributes: these modules never move, and a buffer is slower to look up.
        self._packed = native.pack(weight)
        self._bias = None if bias is None else bias.detach().float()
        self._native = native

    def forward(self, x: Tensor) -> Tensor:
        return self._native.linear(x, self._packed, self._bias, self.out_features)


class NativeRMSNorm(nn.Module):
    """A root-mean-square norm. With another weight in its parameter's place (``torch.func.functional_call``) it runs PyTorch's operations."""

    def __init__(self, native: Native, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps
        self._own = weight.detach()
        self._wide = self._own.float()
        self._native = native

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.data_ptr() == self._own.data_ptr():
            return self._native.rms_norm(x, self._wide, self.variance_epsilon)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(x.dtype)


class GatedMLP(nn.Module):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))`` with the children of the module that it replaces."""

    def __init__(self, native: Native, original: nn.Module) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.add_module(name, original.get_submodule(name))
        self._native = native

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self._native.silu_mul(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return, operator]


class RotaryAttention(nn.Module):
    """Self-attention with rotary embedding over the paged cache: projections, one call that rotates and stores, one that attends.

    The children of the module that it replaces, query and key norms (Qwen3) among them. ``medley_attention`` is set by the runner.
    """

    medley_attention: AttentionPlace

    def __init__(self, native: Native, original: nn.Module, window: int | None) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self.layer_idx: int = original.layer_idx  # type: ignore[assignment]
        self.head_dim: int = original.head_dim  # type: ignore[assignment]
        self._rules = Rules(original.scaling, window)  # type: ignore[arg-type]
        self._has_norms = hasattr(original, "q_norm")
        self._native = native

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            raise TypeError("paged attention does not implement masks")
        place = self.medley_attention
        state = place.state
        query, key, value = (self._heads(project(hidden_states)) for project in (self.q_proj, self.k_proj, self.v_proj))  # type: ignore[operator]
        if self._has_norms:
            # With the batch's dimension, as the original gives it: edits of norms count the rows that come after it.
            query, key = self.q_norm(query[None])[0], self.k_norm(key[None])[0]  # type: ignore[operator]
        angles = (position_embeddings[0][0], position_embeddings[1][0])
        self._native.rotate_and_keep(query, key, value, angles, state.cache.layer(place.layer), state.batch.kv_slots)
        out = place.attend(query, self._rules)
        return self.o_proj(out.view(1, out.shape[0], -1)), None  # type: ignore[operator]

    def _heads(self, projected: Tensor) -> Tensor:
        """``(1, T, heads * head_dim)`` → ``(T, heads, head_dim)``."""
        return projected.view(projected.shape[1], -1, self.head_dim)
