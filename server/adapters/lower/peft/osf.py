"""OSF (Nayak et al. 2025) as PEFT stores it: the smallest singular components of the weight, replaced by trained ones."""

from __future__ import annotations

import torch

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.delta import add_product, linears_with, take_all
from server.adapters.lower.method import COMMON_FIELDS, Method, no_effect
from server.adapters.lower.peft.replaced import lower_replaced_modules
from server.adapters.lower.source import Source

_PARTS = ("osf_svd_params.U_low", "osf_svd_params.S_low", "osf_svd_params.V_low")


def lower(source: Source, base: Base) -> Program:
    """``W += U_low diag(S_low) V_low - (the base's as many smallest components)``: rank 2k, or dense where that is smaller."""
    program = Program()
    for spec in linears_with(source, base, *_PARTS):
        shapes = ((spec.out_features, None), (None,), (None, spec.in_features))
        found = take_all(source, spec.name, dict(zip(_PARTS, shapes, strict=True)))
        if found is None:
            continue
        left, values, right = (tensor.to(base.compute) for tensor in found)
        rank, limit = values.shape[0], min(spec.out_features, spec.in_features)
        if not left.shape[1] == rank == right.shape[0] or rank > limit:
            source.fault("wrong_rank", spec.name, f"U_low, S_low and V_low of one rank are needed, of at most {limit}")
            continue
        base_left, base_values, base_right = torch.linalg.svd(base.weight(spec.name), full_matrices=False)
        kept = limit - rank
        down = torch.cat([right, base_right[kept:]])
        up = torch.cat([left * values, -base_left[:, kept:] * base_values[kept:]], dim=1).T
        add_product(program.linear(spec.name), down, up)
    lower_replaced_modules(source, base, program)
    return program


METHOD = Method(
    name="OSF",
    summary="low rank or dense: trained singular components instead of the base's smallest",
    fields={
        **COMMON_FIELDS,
        "modules_to_save": no_effect,
        # The tensors' shapes say how many components were trained.
        "effective_rank": no_effect,
        "rank_pattern": no_effect,
        "target_svd_config": no_effect,
        "target_modules": no_effect,
        "init_weights": no_effect,
    },
    lower=lower,
)
