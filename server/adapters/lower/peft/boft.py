"""BOFT (Liu et al. 2024) as PEFT stores it: ``y = s * (W (x M)) + b`` with ``M = B_N … B_1``, each factor ``B = P D Pᵀ``.

D is block diagonal, its blocks Cayley transforms; P is a butterfly permutation, the identity for the first factor. The bias is not scaled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, no_effect
from server.adapters.lower.peft.oft import cayley
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS, Group, lower_groups
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """``boft_R (factors, blocks, b, b)``, ``boft_s (out, 1)``. One factor is a rotation and an output scale; several are a dense difference."""

    def lower_site(program: Program, group: Group) -> None:
        site, spec, skewed = group.site, group.spec, group["boft_R"]
        factors, count, size, _ = skewed.shape
        divides = factors == 1 or (size % 2 == 0 and factors < 32 and count % 2 ** (factors - 1) == 0)
        if count * size != spec.in_features or not divides:
            source.fault(
                "wrong_shape",
                f"{site}.boft_R",
                "its factors and blocks do not divide the inputs",
                f"(N, blocks, b, b) with blocks * b = {spec.in_features}; for N > 1 blocks / 2^(N - 1) whole and b even",
                str(tuple(skewed.shape)),
            )
            return
        rotations = cayley(source, site, 0.5 * (skewed - skewed.transpose(-1, -2)))
        if rotations is None:
            return
        scale = group["boft_s"]
        edit = program.linear(site)
        if factors > 1:
            source.reserve(spec.in_features * spec.out_features)
            weight = base.weight(site)
            edit.dense = scale * _turn(weight, rotations) - weight
            return
        edit.rotation, edit.out_scale = rotations[0], scale[:, 0]
        if spec.has_bias:
            bias = base.bias(site)
            edit.shift = bias - edit.out_scale * bias

    return lower_groups(source, base, "boft_", {"boft_R": ("factors", "n", "b", "b"), "boft_s": ("out", 1)}, lower_site)


def _turn(weight: Tensor, rotations: Tensor) -> Tensor:
    """``W Mᵀ``, factor by factor: ``V P Dᵀ Pᵀ`` permutes the columns of V, turns them block by block, and permutes them back."""
    _, count, size, _ = rotations.shape
    for index, blocks in enumerate(rotations):
        order = _butterfly(weight.shape[1], count >> index, size // 2)
        turned = weight[:, order.argsort()].view(-1, count, size)
        weight = torch.einsum("onb,ncb->onc", turned, blocks).flatten(1)[:, order]
    return weight


def _butterfly(width: int, groups: int, half: int) -> Tensor:
    """Where each column goes: in each of the groups, pieces of ``half`` columns, the even ones before the odd ones."""
    pieces = torch.arange(width).view(groups, -1, half)
    return torch.cat([pieces[:, ::2], pieces[:, 1::2]], 1).flatten()


METHOD = Method(
    name="BOFT",
    summary="a rotation of the inputs and an output scale; with more than one butterfly factor a dense difference",
    fields={
        **WRAPPED_FIELDS,
        # The tensors show the blocks and the factors; without its extension for CUDA, PEFT makes one factor whatever the config says.
        "boft_block_size": no_effect,
        "boft_block_num": no_effect,
        "boft_n_butterfly_factor": no_effect,
        "boft_dropout": no_effect,
    },
    lower=lower,
)
