"""DeLoRA (Bini et al. 2025) as PEFT stores it: ``Δ = B diag(lambda / (r |a_i| |b_i|)) A diag(w_norm)``, the norms at least 1e-4."""

from __future__ import annotations

import torch

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, integer, no_effect
from server.adapters.lower.peft.wrapped import MAX_RANK, WRAPPED_FIELDS, Group, Shapes, lower_groups, module_rank
from server.adapters.lower.source import Source

_LEAST_NORM = 1e-4


def lower(source: Source, base: Base) -> Program:
    """Low rank; ``w_norm``, the norms of the columns of W at the start of training, is stored."""

    def lower_site(program: Program, group: Group) -> None:
        rank = group.sizes["r"]
        if module_rank(source, group.site, 8, rank) is None:
            return
        first, second = group["delora_A"], group["delora_B"]
        norms = torch.linalg.vector_norm(first, dim=1).clamp(min=_LEAST_NORM)
        norms = norms * torch.linalg.vector_norm(second, dim=0).clamp(min=_LEAST_NORM)
        edit = program.linear(group.site)
        edit.down = first * group["delora_w_norm"]
        edit.up = (second * (group["delora_lambda"] / rank / norms)).T

    shapes: Shapes = {"delora_A": ("r", "in"), "delora_B": ("out", "r"), "delora_lambda": (1,), "delora_w_norm": ("in",)}
    return lower_groups(source, base, "delora_", shapes, lower_site)


METHOD = Method(
    name="DELORA",
    summary="low rank of bounded norm",
    fields={
        **WRAPPED_FIELDS,
        "r": integer(1, MAX_RANK),
        # Checked where it is used.
        "rank_pattern": no_effect,
        "module_dropout": no_effect,
        # Where the stored lambda began.
        "delora_lambda": no_effect,
        "lambda_pattern": no_effect,
    },
    lower=lower,
)
