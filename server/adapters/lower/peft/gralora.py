"""GraLoRA (Jung et al. 2025) as PEFT stores it: ``k`` blocks of inputs and of outputs, and a part of the rank for each pair of them.

Block ``n`` of the inputs makes ``h_n = x_n A_n`` of ``r`` numbers; its ``j``-th ``r / k`` go to block ``j`` of the outputs, as numbers
``n r / k …`` of what ``B_j`` reads. All of it is scaled by ``alpha / (r + hybrid_r)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, integer, no_effect, number
from server.adapters.lower.peft.wrapped import MAX_RANK, WRAPPED_FIELDS, Group, Shapes, fills_module, lower_groups
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """Low rank ``k r``, the blocks spelt out, and ``hybrid_r`` ranks more of the general pair."""
    hybrid, alpha = source.config.get("hybrid_r", 0), source.config.get("alpha", 64)
    rank = source.config.get("r", 32)

    def shapes(spec: SiteSpec) -> Shapes:
        blocks: dict[str, tuple[str | int, ...]] = {"gralora_A": ("k", "block_in", rank), "gralora_B": ("k", rank, "block_out")}
        if hybrid:
            blocks |= {"gralora_A_general.weight": (hybrid, "in"), "gralora_B_general.weight": ("out", hybrid)}
        return blocks

    def lower_site(program: Program, group: Group) -> None:
        spec, count = group.spec, group.sizes["k"]
        if not fills_module(source, group, count * group.sizes["block_out"], count * group.sizes["block_in"]):
            return
        if rank % count:
            source.fault(
                "wrong_rank",
                group.site,
                "the rank r must be a multiple of the number of blocks",
                f"k times a number, k={count}",
                str(rank),
            )
            return
        source.reserve((count * rank + hybrid) * (spec.in_features + spec.out_features))
        down, up = _spell_out(group["gralora_A"], group["gralora_B"])
        if hybrid:
            down = torch.cat([down, group["gralora_A_general.weight"]])
            up = torch.cat([up, group["gralora_B_general.weight"].T])
        edit = program.linear(group.site)
        edit.down, edit.up = down, up * (alpha / (rank + hybrid))

    return lower_groups(source, base, "gralora_", shapes, lower_site)


def _spell_out(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """``A (k, in / k, r)`` and ``B (k, r, out / k)`` → ``down (k r, in)``, ``up (k r, out)``; rank ``(n, j, s)`` joins block n with block j."""
    count, _, rank = first.shape
    part = rank // count
    block = torch.arange(count)
    down = first.new_zeros(count, rank, count, first.shape[1])
    down[block, :, block] = first.transpose(1, 2)
    up = second.new_zeros(count, count, part, count, second.shape[2])
    up[:, block, :, block] = second.view(count, count, part, -1)
    return down.view(count * rank, -1), up.view(count * rank, -1)


METHOD = Method(
    name="GRALORA",
    summary="low rank: the ranks of all pairs of blocks, and the general pair",
    fields={
        **WRAPPED_FIELDS,
        "r": integer(1, MAX_RANK),
        "hybrid_r": integer(0, MAX_RANK),
        "alpha": number(-1e6, 1e6),
        # The tensors show the number of blocks.
        "gralora_k": no_effect,
        "gralora_dropout": no_effect,
    },
    lower=lower,
)
