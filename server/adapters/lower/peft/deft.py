"""DEFT as PEFT stores it: a subspace of the weight's outputs is taken out and filled anew; PaRa only takes it out."""

from __future__ import annotations

import torch

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.delta import add_product, linears_with
from server.adapters.lower.method import COMMON_FIELDS, Method, boolean, no_effect, number, only, optional
from server.adapters.lower.peft.replaced import lower_biases, lower_replaced_modules
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """``W += Q (s R - V.T W)``; Q and V are both the orthonormal basis of P ("qr"), or P and relu(P) ("relu")."""
    program = Program()
    para, alpha = source.config.get("para", False), source.config.get("alpha")
    for spec in linears_with(source, base, "deft_P", "deft_R"):
        projection = source.take(spec.name, "deft_P", (spec.out_features, None))
        injection = None if para else source.take(spec.name, "deft_R", (None, spec.in_features))
        rank = 0 if projection is None else projection.shape[1]
        if projection is None or not 0 < rank <= spec.out_features:
            source.fault("missing_tensor", f"{spec.name}.deft_P", f"a matrix ({spec.out_features}, r) is needed")
            continue
        if not para and (injection is None or injection.shape[0] != rank):
            source.fault(
                "missing_tensor", f"{spec.name}.deft_R", f"a matrix ({rank}, {spec.in_features}) is needed, or para: true"
            )
            continue
        wide = projection.to(base.compute)
        if source.config.get("decomposition_method", "relu") == "qr":
            left = right = torch.linalg.qr(wide)[0]
        else:
            left, right = wide, torch.relu(wide)
        down = -(right.T @ base.weight(spec.name))
        if injection is not None:
            down += injection.to(base.compute) * (alpha / rank if alpha else 1.0)
        add_product(program.linear(spec.name), down, left.T)
    lower_biases(source, base, program)
    lower_replaced_modules(source, base, program)
    return program


METHOD = Method(
    name="DEFT",
    summary="low rank, computed from the base's weight; `para` too",
    fields={
        **COMMON_FIELDS,
        "decomposition_method": only("relu", "qr"),
        "alpha": optional(number(-1e6, 1e6)),
        "para": boolean,
        "bias": only("none", "all", "deft_only"),
        "modules_to_save": no_effect,
        "r": no_effect,
        **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), no_effect),
        **dict.fromkeys(("init_scale", "init_weights", "fan_in_fan_out", "deft_dropout"), no_effect),
    },
    lower=lower,
)
