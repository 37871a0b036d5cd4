"""Modules of a model on native kernels, in place of Hugging Face's own: the same parameters, children and results, fewer operations.

Children keep their names, so that sites attach where they always do. Which classes have a counterpart here is ``swap``'s business.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from server.adapters.apply import StepEdits
from server.adapters.sites import LinearSite, NormSite
from server.engine.attention import AttentionPlace
from server.engine.kernels.blocks import block_linears
from server.engine.kernels.native import BlockLinears, HeadNorms, Native, PagedAttention, StepRows
from server.engine.kernels.paged import Rules


class NativeRMSNorm(nn.Module):
    """A root-mean-square norm. With another weight in its parameter's place (``torch.func.functional_call``) it runs PyTorch's operations."""

    def __init__(self, native: Native, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps
        self._own = weight.detach()
        self.wide = self._own.float()
        self._native = native

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.data_ptr() == self._own.data_ptr():
            return self._native.rms_norm(x, self.wide, self.variance_epsilon)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(x.dtype)


class _Block(nn.Module):
    """A module of several linears that one native call can run, with what a step's programs do at them; ``projections`` in the call's order."""

    projections: tuple[str, ...]

    def __init__(self, native: Native) -> None:
        super().__init__()
        self._native = native
        self._sites: list[nn.Module] = []

    @property
    def edits(self) -> StepEdits | None:
        """The running step's."""
        last = self.linears[-1]
        return last.state.edits if isinstance(last, LinearSite) else None

    @property
    def linears(self) -> list[nn.Module]:
        """The projections; those that are sites are remembered, since a module finds its children slowly."""
        if self._sites:
            return self._sites
        found = [self.get_submodule(name) for name in self.projections]
        if all(isinstance(item, LinearSite) for item in found):
            self._sites = found
        return found

    @cached_property
    def _plain(self) -> BlockLinears | None:
        return block_linears(self.linears, None)

    def together(self, edits: StepEdits | None) -> BlockLinears | None:
        """The linears of a step for the native call; None: call the modules."""
        if edits is None:
            return self._plain
        last = self.linears[-1]
        assert isinstance(last, LinearSite)
        return edits.once(f"{last.spec.name} together", lambda: self._edited(edits))

    def _edited(self, edits: StepEdits) -> BlockLinears | None:
        return block_linears(self.linears, edits)

    def finished(self, y: Tensor, edits: StepEdits | None) -> Tensor:
        """The call's result with what is added after the last linear."""
        last = self.linears[-1]
        return y if edits is None or not isinstance(last, LinearSite) else last.finished(y, edits)


class GatedMLP(_Block):
    """``down_proj(silu(gate_proj(x)) * up_proj(x))`` with the children of the module that it replaces."""

    projections = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, native: Native, original: nn.Module) -> None:
        super().__init__(native)
        for name in self.projections:
            self.add_module(name, original.get_submodule(name))

    def forward(self, x: Tensor) -> Tensor:
        edits = self.edits
        together = self.together(edits)
        if together is not None:
            return self.finished(self._native.gated_mlp(x, together), edits)
        return self.down_proj(self._native.silu_mul(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return, operator]


class RotaryAttention(_Block):
    """Self-attention with rotary embedding over the paged cache: projections, one call that rotates and stores, one that attends.

    The children of the module that it replaces, query and key norms (Qwen3) among them. ``medley_attention`` is set by the runner.
    """

    projections = ("q_proj", "k_proj", "v_proj", "o_proj")
    medley_attention: AttentionPlace

    def __init__(self, native: Native, original: nn.Module, window: int | None) -> None:
        super().__init__(native)
        for name, child in original.named_children():
            self.add_module(name, child)
        self.layer_idx: int = original.layer_idx  # type: ignore[assignment]
        self.head_dim: int = original.head_dim  # type: ignore[assignment]
        self._rules = Rules(original.scaling, window)  # type: ignore[arg-type]
        self._has_norms = hasattr(original, "q_norm")

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            raise TypeError("paged attention does not implement masks")
        edits = self.edits
        together = self.together(edits)
        if together is not None:
            rows = self.step_rows(position_embeddings)
            return self.finished(self._native.attention_block(hidden_states, together, self.paged, rows), edits), None
        query, key, value = (self._heads(project(hidden_states)) for project in (self.q_proj, self.k_proj, self.v_proj))  # type: ignore[operator]
        if self._has_norms:
            # With the batch's dimension, as the original gives it: edits of norms count the rows that come after it.
            query, key = self.q_norm(query[None])[0], self.k_norm(key[None])[0]  # type: ignore[operator]
        place = self.medley_attention
        angles, state = (position_embeddings[0][0], position_embeddings[1][0]), place.state
        self._native.rotate_and_keep(query, key, value, angles, state.cache.layer(place.layer), state.batch.kv_slots)
        out = place.attend(query, self._rules)
        return self.o_proj(out.view(1, out.shape[0], -1)), None  # type: ignore[operator]

    def together(self, edits: StepEdits | None) -> BlockLinears | None:
        """As of every block; a kernel that was chosen for itself attends itself."""
        return super().together(edits) if self.medley_attention.state.kernel == self._native.attention else None

    def step_rows(self, angles: tuple[Tensor, Tensor]) -> StepRows:
        """The step's rows for native calls, made once for all layers that turn by the same angles."""
        state = self.medley_attention.state
        if state.rows is None or state.rows.angles is not angles:
            state.rows = self._native.step_rows(angles, state.batch.kv_slots, state.batch.paged)
        return state.rows

    @cached_property
    def paged(self) -> PagedAttention:
        """This attention for native calls, on the cache that the runner gave it."""
        place = self.medley_attention
        return self._native.paged_attention(place.state.cache.layer(place.layer), self._rules, self._head_norms)

    def _edited(self, edits: StepEdits) -> BlockLinears | None:
        norms = (self.get_submodule("q_norm"), self.get_submodule("k_norm")) if self._has_norms else ()
        if edits.extras(self.medley_attention.site, "side") or any(has_norm_edits(norm, edits) for norm in norms):
            return None
        return super()._edited(edits)

    @property
    def _head_norms(self) -> HeadNorms | None:
        """What the native call needs of the norms of queries and keys."""
        if not self._has_norms:
            return None
        query, key = (native_norm(self.get_submodule(name)) for name in ("q_norm", "k_norm"))
        return HeadNorms(query.wide, key.wide, query.variance_epsilon)

    def _heads(self, projected: Tensor) -> Tensor:
        """``(1, T, heads * head_dim)`` → ``(T, heads, head_dim)``."""
        return projected.view(projected.shape[1], -1, self.head_dim)


def native_norm(norm: nn.Module) -> NativeRMSNorm:
    """A norm of the base, be it a site or not."""
    inner = norm.inner if isinstance(norm, NormSite) else norm
    assert isinstance(inner, NativeRMSNorm)
    return inner


def has_norm_edits(norm: nn.Module, edits: StepEdits) -> bool:
    """Whether a step's programs have parameters of their own for some of a norm's rows."""
    return isinstance(norm, NormSite) and bool(edits.extras(norm.spec.name, "norm"))
