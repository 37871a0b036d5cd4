"""SHiRA (Bhardwaj et al. 2024) as PEFT stores it: a sparse change of the weight, as values and their places."""

from __future__ import annotations

import torch

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.delta import add_dense, linears_with
from server.adapters.lower.method import COMMON_FIELDS, Method, no_effect
from server.adapters.lower.peft.replaced import lower_replaced_modules
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """``W[row, column] += value``; places that occur twice add up."""
    program = Program()
    for spec in linears_with(source, base, "shira_weight", "shira_indices"):
        values = source.take(spec.name, "shira_weight", (None,))
        places = source.take(spec.name, "shira_indices", (2, None), integers=True)
        if values is None or places is None or places.shape[1] != values.shape[0]:
            source.fault("missing_tensor", spec.name, "shira_weight (n) and shira_indices (2, n) are needed")
            continue
        sizes = torch.tensor([[spec.out_features], [spec.in_features]])
        if bool(((places < 0) | (places >= sizes)).any()):
            source.fault(
                "wrong_shape",
                f"{spec.name}.shira_indices",
                "a place lies outside the weight",
                f"rows below {spec.out_features}, columns below {spec.in_features}",
            )
            continue
        delta = torch.zeros(spec.out_features, spec.in_features, dtype=base.compute)
        delta.index_put_((places[0], places[1]), values.to(base.compute), accumulate=True)
        add_dense(program.linear(spec.name), delta)
    lower_replaced_modules(source, base, program)
    return program


METHOD = Method(
    name="SHIRA",
    summary="a sparse change of the weight, as a dense one",
    fields={
        **COMMON_FIELDS,
        "modules_to_save": no_effect,
        "target_modules": no_effect,
        # The places are stored; these say how they were drawn.
        **dict.fromkeys(("r", "mask_type", "random_seed", "fan_in_fan_out", "init_weights"), no_effect),
    },
    lower=lower,
)
