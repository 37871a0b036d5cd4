"""Poly (Ponti et al. 2023) as PEFT stores it: skills, low-rank pairs in splits, mixed by a router that knows a task's id.

The mixture of a task is ``σ(logits) / (Σ σ(logits) + 1e-12)`` in every split; ``Δ = A B / r`` with A and B mixed so. The id comes with each
call in PEFT, so that only a checkpoint of one task says by itself what it does.
"""

from __future__ import annotations

from typing import Any

import torch

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, integer, only
from server.adapters.lower.peft.wrapped import MAX_RANK, WRAPPED_FIELDS, Group, fills_module, lower_groups
from server.adapters.lower.source import Source

_EPSILON = 1e-12
_ROUTER = "poly_router.module_logits"


def lower(source: Source, base: Base) -> Program:
    """Low rank, mixed for the only task."""
    rank, skills, splits = (source.config.get(*item) for item in (("r", 8), ("n_skills", 4), ("n_splits", 1)))

    def lower_site(program: Program, group: Group) -> None:
        if not fills_module(source, group, splits * group.sizes["part_out"], splits * group.sizes["part_in"]):
            return
        weights = group[_ROUTER].view(splits, skills).sigmoid()
        weights = weights / (weights.sum(-1, keepdim=True) + _EPSILON)
        first = torch.einsum("qs,qsdr->qdr", weights, group["poly_lora_A"]).flatten(0, 1)
        second = torch.einsum("qs,qsrd->rqd", weights, group["poly_lora_B"]).flatten(1)
        edit = program.linear(group.site)
        edit.down, edit.up = first.T, second / rank

    shapes = {
        "poly_lora_A": (splits, skills, "part_in", rank),
        "poly_lora_B": (splits, skills, rank, "part_out"),
        _ROUTER: (1, splits * skills),
    }
    return lower_groups(source, base, "poly_", shapes, lower_site)


def _one_task(value: Any) -> str | None:
    return (
        None
        if type(value) is int and value == 1
        else "1: of several tasks, the checkpoint does not say which one is to be served"
    )


METHOD = Method(
    name="POLY",
    summary="low rank, mixed for the only task; with several tasks refused: the checkpoint does not say which one",
    fields={
        **WRAPPED_FIELDS,
        "r": integer(1, MAX_RANK),
        "poly_type": only("poly"),
        "n_tasks": _one_task,
        "n_skills": integer(1, MAX_RANK),
        "n_splits": integer(1, MAX_RANK),
    },
    lower=lower,
)
