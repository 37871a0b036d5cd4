"""Putting native modules into a model in place of Hugging Face's own. A table of classes that are known by name, and nothing else.

What is not in the table stays as it is: linears of every family are, norms, gated MLPs, attentions and bodies where their code is the one that
the native module repeats. tests/server/engine/kernels/test_swap.py holds every family's logits to those of the model as it was.
"""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from server.engine.kernels.modules import GatedMLP, NativeRMSNorm, RotaryAttention
from server.engine.kernels.native import Native
from server.engine.kernels.packed_linear import PackedLinear
from server.engine.kernels.stack import DecoderStack, has_native_blocks

_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_NORMS = frozenset(f"{family}RMSNorm" for family in (*_FAMILIES, "Phi3"))
_MLPS = frozenset(f"{family}MLP" for family in _FAMILIES)
_ATTENTIONS = frozenset(f"{family}Attention" for family in _FAMILIES)
_BODIES = frozenset(f"{family}Model" for family in _FAMILIES)


def swap_native(model: nn.Module, native: Native) -> None:
    """Replace what native modules can. Call before sites are attached: replaced linears have no ``weight`` any more."""
    # Children before their parents, which take them over.
    for name, module in reversed(list(model.named_modules())):
        found = _native_for(module, native)
        if found is not None:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, found)


def _native_for(module: nn.Module, native: Native) -> nn.Module | None:
    kind = type(module).__name__
    if type(module) is nn.Linear:
        return PackedLinear(native, module.weight, module.bias)
    if type(module) is Conv1D:
        return PackedLinear(native, module.weight.T, module.bias)
    if kind in _NORMS:
        return NativeRMSNorm(native, module.weight, module.variance_epsilon)  # type: ignore[arg-type]
    if kind in _MLPS and module.config.hidden_act in ("silu", "swish"):  # type: ignore[union-attr, operator]
        return GatedMLP(native, module)
    if kind in _ATTENTIONS:
        return RotaryAttention(native, module, _window(module))
    if kind in _BODIES and has_native_blocks(module):
        return DecoderStack(native, module)
    return None


def _window(attention: nn.Module) -> int | None:
    """The sliding window, where the layer has one."""
    if type(attention).__name__ == "MistralAttention":
        return getattr(attention.config, "sliding_window", None)
    return getattr(attention, "sliding_window", None)
