"""P-tuning (Liu et al. 2021) as PEFT stores it: virtual tokens that a small network made, which was applied before saving."""

from __future__ import annotations

from server.adapters.lower.method import Method, no_effect
from server.adapters.lower.peft.prompt_tuning import lower
from server.adapters.lower.peft.virtual_tokens import PROMPT_FIELDS

METHOD = Method(
    name="P_TUNING",
    summary="virtual tokens in front of the prompt; the network that made them was applied before saving",
    fields={
        **PROMPT_FIELDS,
        "encoder_reparameterization_type": no_effect,
        "encoder_hidden_size": no_effect,
        "encoder_num_layers": no_effect,
        "encoder_dropout": no_effect,
    },
    lower=lower,
)
