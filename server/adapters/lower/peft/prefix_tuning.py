"""Prefix tuning (Li and Liang 2021; P-tuning v2) as PEFT stores it: keys and values of every layer in front of the prompt's."""

from __future__ import annotations

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, no_effect
from server.adapters.lower.peft.replaced import lower_replaced_modules
from server.adapters.lower.peft.virtual_tokens import PROMPT_FIELDS, lower_prefix
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """Keys and values go into the cache as they are: keys are never rotated."""
    program = Program(prologue=lower_prefix(source, base))
    lower_replaced_modules(source, base, program)
    return program


METHOD = Method(
    name="PREFIX_TUNING",
    summary="keys and values in front of the prompt's, copied into the cache and shared",
    fields={
        **PROMPT_FIELDS,
        # A projection was applied before saving.
        "prefix_projection": no_effect,
        "encoder_hidden_size": no_effect,
        "init_weights": no_effect,
    },
    lower=lower,
)
