"""MiSS (Kang et al. 2024) as PEFT stores it. By default ``Δ = blockᵀ S``, where row ``i`` of S adds up the inputs ``j`` with ``j % r == i``."""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, integer, no_effect, only
from server.adapters.lower.peft.wrapped import MAX_RANK, WRAPPED_FIELDS, Group, lower_groups
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    return lower_blocks(source, base, "miss_block")


def lower_blocks(source: Source, base: Base, tail: str) -> Program:
    """By ``init_weights``, which names the variant: default ``(r, out)``; mini ``(r, mini_r)``, repeated over the outputs; bat
    ``(out / r, r, r)``, where every block of W changes by ``W_block M + M``."""
    mode, rank = source.config.get("init_weights", True), source.config.get("r", 64)

    def lower_site(program: Program, group: Group) -> None:
        spec = group.spec
        fits = rank <= spec.in_features
        if mode == "bat":
            fits = fits and group.sizes["n"] * rank == spec.out_features and spec.in_features % rank == 0
        if mode == "mini":
            fits = fits and spec.out_features % group[tail].shape[1] == 0
        if not fits:
            source.fault(
                "wrong_shape",
                f"{group.site}.{tail}",
                "the blocks do not divide the module",
                str((spec.out_features, spec.in_features)),
                str(tuple(group[tail].shape)),
            )
        elif mode == "bat":
            source.reserve(spec.in_features * spec.out_features)
            program.linear(group.site).dense = _bat(base.weight(group.site), group[tail])
        else:
            source.reserve(rank * (spec.in_features + spec.out_features))
            edit = program.linear(group.site)
            edit.down = (torch.arange(spec.in_features) % rank == torch.arange(rank)[:, None]).to(base.compute)
            edit.up = group[tail].repeat(1, spec.out_features // group[tail].shape[1])

    shape: tuple[str | int, ...] = (rank, "out")
    if mode == "bat":
        shape = ("n", rank, rank)
    elif mode == "mini":
        shape = (rank, source.config.get("mini_r", 1))
    return lower_groups(source, base, tail, {tail: shape}, lower_site)


def _bat(weight: Tensor, blocks: Tensor) -> Tensor:
    """``(out, in)`` from W and ``blocks (out / r, r, r)``: block row ``i`` of W times ``blocks[i]``, plus ``blocks[i]``."""
    count, rank, _ = blocks.shape
    tiled = weight.view(count, rank, -1, rank).transpose(1, 2)
    return (tiled @ blocks[:, None] + blocks[:, None]).transpose(1, 2).reshape(weight.shape)


METHOD = Method(
    name="MISS",
    summary="low rank; the variant bat is a dense difference",
    fields={
        **WRAPPED_FIELDS,
        "r": integer(1, MAX_RANK),
        "mini_r": integer(1, MAX_RANK),
        "init_weights": only(True, False, None, "bat", "mini"),
        "miss_dropout": no_effect,
    },
    lower=lower,
)
