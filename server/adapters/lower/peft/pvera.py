"""PVeRA (probabilistic VeRA) as PEFT stores it: at inference the mean, which is VeRA with the first half of d and of A."""

from __future__ import annotations

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, no_effect, only
from server.adapters.lower.peft.vera import METHOD as VERA
from server.adapters.lower.peft.vera import lower_shared_projections
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    return lower_shared_projections(source, base, "pvera", halves=2)


METHOD = Method(
    name="PVERA",
    summary="low rank: the mean of what was learned; sampling at inference is refused",
    fields={
        **{name: rule for name, rule in VERA.fields.items() if name != "vera_dropout"},
        "pvera_dropout": no_effect,
        # Its result would be another one each time.
        "sample_at_inference": only(False, None),
        "generator_seed": no_effect,
    },
    lower=lower,
)
