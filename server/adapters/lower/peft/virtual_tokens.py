"""What PEFT's prompt-learning checkpoints share: one tensor ``prompt_embeddings``, read as virtual tokens or as a prefix's keys and values.

Formulas: docs/PEFT.md, and ``PeftModel.get_prompt`` of PEFT 0.21. Either way real tokens get the positions behind the virtual ones. Knows
nothing of how the tensor was trained, nor of heads that are stored beside it.
"""

from __future__ import annotations

from torch import Tensor

from server.adapters.ir import Prologue
from server.adapters.lower.base import Base
from server.adapters.lower.method import COMMON_FIELDS, Rule, integer, no_effect, only, optional
from server.adapters.lower.source import Source

_COUNT = optional(integer(1, 1 << 24))
PROMPT_FIELDS: dict[str, Rule] = {
    **COMMON_FIELDS,
    # Checked against the tensors, or against the base where the tensors' shape depends on them.
    "num_virtual_tokens": _COUNT,
    "token_dim": _COUNT,
    "num_attention_heads": _COUNT,
    "num_layers": _COUNT,
    # Two would be an encoder's and a decoder's.
    "num_transformer_submodules": only(1, None),
    "modules_to_save": no_effect,
}


def lower_tokens(source: Source, base: Base) -> Prologue:
    """Virtual tokens ``(P, hidden)``: they stand for the embedding's output, after the embedding's own scale."""
    return Prologue(tokens=take_prompt(source, base, base.spec.hidden_size), tokens_site=base.spec.embedding)


def lower_prefix(source: Source, base: Base) -> Prologue:
    """``(P, 2 * layers * kv_heads * head_dim)``: for every virtual token the key and the value of each layer, as they lie in the cache."""
    spec = base.spec
    width = spec.num_kv_heads * spec.head_dim
    stated = {"num_layers": spec.num_layers, "num_attention_heads": spec.num_kv_heads, "token_dim": width}
    for field, value in stated.items():
        if source.config.get(field) not in (None, value):
            source.field_fault(field, "the prefix was made for a base with other keys and values", str(value))
    prompt = take_prompt(source, base, spec.num_layers * 2 * width)
    if prompt is None:
        return Prologue()
    entries = prompt.view(prompt.shape[0], spec.num_layers, 2, spec.num_kv_heads, spec.head_dim)
    return Prologue(kv=entries.permute(1, 2, 3, 0, 4))


def take_prompt(source: Source, base: Base, width: int) -> Tensor | None:
    """``prompt_embeddings (P, width)``; None, with the fault recorded, when it is not there or does not fit."""
    if "prompt_embeddings" not in source.shared:
        source.fault(
            "missing_tensor",
            "prompt_embeddings",
            "the checkpoint holds no virtual tokens; save the adapter again",
            f"(P, {width})",
        )
        return None
    prompt = source.take_shared("prompt_embeddings", (None, width))
    if prompt is None:
        return None
    if source.config.get("num_virtual_tokens") not in (None, prompt.shape[0]):
        source.field_fault(
            "num_virtual_tokens", "tensors and config disagree on the number of virtual tokens", str(prompt.shape[0])
        )
    return prompt.to(base.compute)
