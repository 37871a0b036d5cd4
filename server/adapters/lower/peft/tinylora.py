"""TinyLoRA ("Learning to Reason in 13 Parameters", 2026) as PEFT stores it: ``Δ = B (Σ v_i P_i) A`` with A and B from the SVD of W, both stored.

The vectors v are shared by groups of modules; the random P ``(u, r, r)`` of a module is stored, or drawn again from a seed of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, boolean, integer, no_effect, number
from server.adapters.lower.peft.wrapped import (
    LINEARS,
    MAX_RANK,
    WRAPPED_FIELDS,
    Group,
    Shapes,
    shared_tensor,
    tensor_groups,
    with_saved_modules,
)
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """Low rank on linears; on embeddings ``E[id] + B[id] (Σ v_i P_i) A``."""
    program = Program()
    stored = source.config.get("save_projection", True)

    def shapes(spec: SiteSpec) -> Shapes:
        wide, narrow = ("out", "in") if spec.kind == "embedding" else ("in", "out")
        found: dict[str, tuple[str | int, ...]] = {"tinylora_A": ("r", wide), "tinylora_B": (narrow, "r")}
        # PEFT draws them again, too, where they should be stored and are not.
        if stored and source.has(spec.name, "tinylora_P"):
            found["tinylora_P"] = (source.config.get("u", 64), "r", "r")
        return found

    groups = list(tensor_groups(source, base, "tinylora_", shapes, kinds=(*LINEARS, "embedding")))
    vectors = _vectors(source, len(groups))
    if vectors is None:
        return program
    for index, group in enumerate(groups):
        vector = vectors[index].to(base.compute)
        mixed = torch.tensordot(vector, _projection(source, group, index).to(base.compute), dims=1)
        if group.spec.kind == "embedding":
            embed = program.embed(group.site)
            embed.down, embed.up = group["tinylora_B"] @ mixed, group["tinylora_A"]
        else:
            edit = program.linear(group.site)
            edit.down, edit.up = group["tinylora_A"], (group["tinylora_B"] @ mixed).T
    return with_saved_modules(source, base, program)


def _vectors(source: Source, count: int) -> list[Tensor] | None:
    """The vector of each of ``count`` modules: consecutive ones share theirs, by PEFT's rule for ``weight_tying``."""
    distinct = max(1, round(count * (1.0 - source.config.get("weight_tying", 0.0))))
    size = max(1, count // distinct)
    owners = [min(index // size, distinct - 1) for index in range(count)]
    found: dict[int, Tensor] = {}
    for owner in sorted(set(owners)):
        vector = shared_tensor(source, f"tinylora_v.{owner}", (source.config.get("u", 64),))
        if vector is None:
            return None
        found[owner] = vector
    return [found[owner] for owner in owners]


def _projection(source: Source, group: Group, index: int) -> Tensor:
    """P ``(u, r, r)`` of the ``index``-th module, stored or as PEFT draws it: normal, with the deviation ``1 / sqrt(r)``."""
    rank, length = group.sizes["r"], source.config.get("u", 64)
    if "tinylora_P" in group.tensors:
        return group["tinylora_P"]
    source.reserve(length * rank * rank)
    generator = torch.Generator().manual_seed(source.config.get("projection_seed", 42) + index)
    return torch.normal(0.0, 1.0 / rank**0.5, (length, rank, rank), generator=generator, dtype=torch.float32)


METHOD = Method(
    name="TINYLORA",
    summary="low rank; its random matrices as stored, or drawn again from their seeds",
    fields={
        **WRAPPED_FIELDS,
        "weight_tying": number(0.0, 1.0),
        "projection_seed": integer(0, 2**62),
        "save_projection": boolean,
        "u": integer(1, MAX_RANK),
        # Narrow modules have fewer ranks than this; the tensors show them.
        "r": integer(1, MAX_RANK),
        "init_v_bound": no_effect,
        "tinylora_dropout": no_effect,
    },
    lower=lower,
)
