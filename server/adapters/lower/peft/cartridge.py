"""Cartridges (Eyuboglu et al. 2025) as PEFT stores them: the keys and values of a context, distilled and stored like a prefix."""

from __future__ import annotations

from server.adapters.lower.method import Method, no_effect
from server.adapters.lower.peft.prefix_tuning import lower
from server.adapters.lower.peft.virtual_tokens import PROMPT_FIELDS

METHOD = Method(
    name="CARTRIDGE",
    summary="keys and values in front of the prompt's, copied into the cache and shared",
    # Frozen or trained, the tokens are stored together.
    fields={**PROMPT_FIELDS, "num_frozen_tokens": no_effect},
    lower=lower,
)
