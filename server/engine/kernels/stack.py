"""A decoder's body of the Llama shape: embedding, layers one after the other, last norm. Knows blocks and norms, not what a block computes.

All layers of a step are one native call, unless its programs do something between the blocks: then the layers are called one by one, with
Hugging Face's code, and each block is a call of its own. Both give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from server.adapters.apply import StepEdits
from server.engine.kernels.blocks import LayerParts, layer_stack
from server.engine.kernels.modules import GatedMLP, RotaryAttention, has_norm_edits, native_norm
from server.engine.kernels.native import LayerStack, Native

_BETWEEN = frozenset({"bottleneck", "intervention"})
"""Kinds of edits that act between two blocks."""


class DecoderStack(nn.Module):
    """The children of the module that it replaces; its layers' attentions and MLPs are native blocks."""

    def __init__(self, native: Native, original: nn.Module) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self._native = native

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool = False) -> BaseModelOutputWithPast:
        """Tokens and their positions, both ``(1, T)``. Raises TypeError for a cache that is asked for."""
        if use_cache:
            raise TypeError("keys and values are in the paged cache, of which nothing is given out")
        hidden = self.embed_tokens(input_ids)  # type: ignore[operator]
        angles = self.rotary_emb(hidden, position_ids)  # type: ignore[operator]
        attention, mlp = self._blocks[0]
        together = self.together(mlp.edits)
        if together is not None:
            hidden = self._native.decoder_layers(hidden, together, attention.step_rows(angles))
        else:
            for layer in self._layers:
                hidden = layer(hidden, position_embeddings=angles)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))  # type: ignore[operator]

    def together(self, edits: StepEdits | None) -> LayerStack | None:
        """The layers of a step for the native call; None: call them one by one."""
        return self._plain if edits is None else edits.once("layers together", lambda: self._edited(edits))

    @cached_property
    def _plain(self) -> LayerStack | None:
        return self._joined(None)

    def _edited(self, edits: StepEdits) -> LayerStack | None:
        if edits.kinds & _BETWEEN or any(has_norm_edits(norm, edits) for layer in self._layers for norm in _norms(layer)):
            return None
        return self._joined(edits)

    def _joined(self, edits: StepEdits | None) -> LayerStack | None:
        parts = []
        for layer, (attention, mlp) in zip(self._layers, self._blocks, strict=True):
            first, second = attention.together(edits), mlp.together(edits)
            if first is None or second is None:
                return None
            norms = [native_norm(norm) for norm in _norms(layer)]
            parts.append(LayerParts([(norm.wide, norm.variance_epsilon) for norm in norms], first, second, attention.paged))
        return layer_stack(parts)

    @property
    def _layers(self) -> Iterator[nn.Module]:
        return iter(self.get_submodule("layers").children())

    @cached_property
    def _blocks(self) -> list[tuple[RotaryAttention, GatedMLP]]:
        """Of each layer; not registered as modules a second time."""
        return [(layer.self_attn, layer.mlp) for layer in self._layers]  # type: ignore[misc]


def _norms(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Those through which a layer's attention and its MLP read the residual stream."""
    return layer.input_layernorm, layer.post_attention_layernorm  # type: ignore[return-value]


def has_native_blocks(body: nn.Module) -> bool:
    """Whether the blocks of all layers are native ones."""
    layers = body.get_submodule("layers").children()
    return all(isinstance(layer.self_attn, RotaryAttention) and isinstance(layer.mlp, GatedMLP) for layer in layers)
