"""OSF (Nayak et al. 2025) as PEFT stores it: the smallest singular components of the weight, replaced by trained ones."""

from __future__ import annotations

import torch

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.cheapest import product, set_cheapest
from server.adapters.lower.method import Method, no_effect
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS, Group, lower_groups
from server.adapters.lower.source import Source

_LEFT, _VALUES, _RIGHT = "osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low"


def lower(source: Source, base: Base) -> Program:
    """``W += U_low diag(S_low) V_low - (the base's as many smallest components)``: rank 2r, or dense where that is smaller."""

    def lower_site(program: Program, group: Group) -> None:
        rank, limit = group.sizes["r"], min(group.spec.out_features, group.spec.in_features)
        if rank > limit:
            source.fault("wrong_rank", group.site, "more singular components than the weight has", f"at most {limit}", str(rank))
            return
        # A module as narrow as the rank that is kept has nothing left to train.
        if not rank:
            return
        left, values, right = torch.linalg.svd(base.weight(group.site), full_matrices=False)
        kept = limit - rank
        down = torch.cat([group[_RIGHT], right[kept:]])
        up = torch.cat([group[_LEFT] * group[_VALUES], -left[:, kept:] * values[kept:]], dim=1).T
        set_cheapest(source, program.linear(group.site), product(down, up))

    shapes = {_LEFT: ("out", "r"), _VALUES: ("r",), _RIGHT: ("r", "in")}
    return lower_groups(source, base, "osf_", shapes, lower_site, may_be_empty=True)


METHOD = Method(
    name="OSF",
    summary="low rank or dense: trained singular components instead of the base's smallest",
    # The tensors show how many components were trained.
    fields={**WRAPPED_FIELDS, **dict.fromkeys(("effective_rank", "rank_pattern", "target_svd_config"), no_effect)},
    lower=lower,
)
