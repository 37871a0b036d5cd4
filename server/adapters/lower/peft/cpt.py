"""Context-aware prompt tuning (Blau et al. 2024) as PEFT stores it: virtual tokens that began as tokens of the vocabulary."""

from __future__ import annotations

from server.adapters.lower.method import Method, no_effect
from server.adapters.lower.peft.prompt_tuning import lower
from server.adapters.lower.peft.virtual_tokens import PROMPT_FIELDS

METHOD = Method(
    name="CPT",
    summary="virtual tokens in front of the prompt: embeddings of context tokens with what was learnt added before saving",
    fields={
        **PROMPT_FIELDS,
        "is_prompt_learning": no_effect,
        "tokenizer_name_or_path": no_effect,
        # The sum of token embedding and difference is stored; masks, losses and bounds are for training.
        "cpt_token_ids": no_effect,
        "cpt_mask": no_effect,
        "cpt_tokens_type_mask": no_effect,
        "opt_weighted_loss_type": no_effect,
        "opt_loss_decay_factor": no_effect,
        "opt_projection_epsilon": no_effect,
        "opt_projection_format_epsilon": no_effect,
    },
    lower=lower,
)
