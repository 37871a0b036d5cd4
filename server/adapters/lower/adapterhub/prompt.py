"""Prompt tuning (Lester et al. 2021) as AdapterHub stores it: virtual tokens after the norm of an encoder's embeddings.

They have no position and no type, and real tokens keep their positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from server.adapters.ir import Program, Prologue
from server.adapters.lower.adapterhub.options import ENVELOPE, Part, one_config
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, Rule, integer, no_effect, only
from server.adapters.lower.source import Source

_FIELDS: dict[str, Rule] = {
    "architecture": only("prompt_tuning"),
    "prompt_length": integer(1, 4096),
    "combine": only("prefix", "prefix_after_bos"),
    **dict.fromkeys(("prompt_init", "prompt_init_text", "random_uniform_scale", "init_weights_seed"), no_effect),
}


def _lower(source: Source, base: Base, program: Program, given: Mapping[str, Any]) -> None:
    """The virtual tokens, as the program's prologue."""
    if not base.spec.embedding_norm:
        message = f"the library has prompt tuning for encoders only, not for {base.spec.family}"
        source.fault("unsupported_method", f"{source.file}: config.architecture", message)
        source.stop_if_faulty()
    shape = (given.get("prompt_length", 10), base.spec.hidden_size)
    tokens = source.take_shared("prompt_tunings.prompt_embedding.weight", shape)
    if tokens is None:
        source.fault(
            "missing_tensor",
            "prompt_embedding.weight",
            "the checkpoint lacks the embeddings of its virtual tokens; save the adapter again",
        )
    else:
        program.prologue = Prologue(
            tokens=tokens.to(base.compute),
            tokens_site=base.spec.embedding_norm,
            shifts=False,
            after_first=given.get("combine") == "prefix_after_bos",
        )


METHOD = Method(
    name="prompt_tuning",
    summary="virtual tokens after the norm of an encoder's embeddings, positions not shifted",
    fields=ENVELOPE,
    lower=one_config(Part(_FIELDS, _lower)),
)
