"""DEFT as PEFT stores it: a subspace of the weight's outputs is taken out and filled anew; PaRa only takes it out."""

from __future__ import annotations

import torch

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.cheapest import product, set_cheapest
from server.adapters.lower.method import Method, boolean, no_effect, number, only, optional
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS, Group, Shapes, lower_groups
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """``W += Q (s R - V.T W)``; Q and V are both the orthonormal basis of P ("qr"), or P and relu(P) ("relu")."""
    para, alpha = source.config.get("para", False), source.config.get("alpha")

    def lower_site(program: Program, group: Group) -> None:
        rank, projection = group.sizes["r"], group["deft_P"]
        if rank > group.spec.out_features:
            source.fault(
                "wrong_rank", group.site, "the rank is larger than the module", f"at most {group.spec.out_features}", str(rank)
            )
            return
        if source.config.get("decomposition_method", "relu") == "qr":
            left = right = torch.linalg.qr(projection)[0]
        else:
            left, right = projection, torch.relu(projection)
        down = -(right.T @ base.weight(group.site))
        if not para:
            down += group["deft_R"] * (alpha / rank if alpha else 1.0)
        set_cheapest(source, program.linear(group.site), product(down, left.T))

    shapes: Shapes = {"deft_P": ("out", "r")} if para else {"deft_P": ("out", "r"), "deft_R": ("r", "in")}
    return lower_groups(source, base, "deft_", shapes, lower_site)


METHOD = Method(
    name="DEFT",
    summary="low rank, computed from the base's weight; `para` too",
    fields={
        **WRAPPED_FIELDS,
        "decomposition_method": only("relu", "qr"),
        "alpha": optional(number(-1e6, 1e6)),
        "para": boolean,
        # The tensors show the rank.
        "r": no_effect,
        "init_scale": no_effect,
        "deft_dropout": no_effect,
    },
    lower=lower,
)
