"""Trainable tokens as PEFT stores them: rows that replace an embedding's. Which ones, only the config knows."""

from __future__ import annotations

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, token_ids
from server.adapters.lower.peft.replaced import lower_token_rows
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """Replaced rows, of a tied head too."""
    program = Program()
    ids = source.config.get("token_indices", [])
    lower_token_rows(source, base, program, ids, field="token_indices", tail="trainable_tokens_delta")
    return program


METHOD = Method(
    name="TRAINABLE_TOKENS",
    summary="replaced rows of the embedding and of a tied head",
    fields={**WRAPPED_FIELDS, "token_indices": token_ids},
    lower=lower,
)
