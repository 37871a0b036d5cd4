"""Prompt tuning (Lester et al. 2021) as PEFT stores it: embeddings of virtual tokens in front of the prompt."""

from __future__ import annotations

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, no_effect
from server.adapters.lower.peft.replaced import lower_replaced_modules
from server.adapters.lower.peft.virtual_tokens import PROMPT_FIELDS, lower_tokens
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """The stored embeddings are the virtual tokens, whatever they were initialised with."""
    program = Program(prologue=lower_tokens(source, base))
    lower_replaced_modules(source, base, program)
    return program


METHOD = Method(
    name="PROMPT_TUNING",
    summary="virtual tokens in front of the prompt, computed once and shared through the prefix cache",
    fields={
        **PROMPT_FIELDS,
        "prompt_tuning_init": no_effect,
        "prompt_tuning_init_text": no_effect,
        "tokenizer_name_or_path": no_effect,
        "tokenizer_kwargs": no_effect,
    },
    lower=lower,
)
