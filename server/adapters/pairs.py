"""Outputs in pairs, for rotations of them: how they are grouped, and how a group is swapped."""

from __future__ import annotations

import torch
from torch import Tensor


def are_pairs(out_features: int, group: int) -> bool:
    """Whether outputs are pairs in groups of this size: the halves of every group."""
    return group > 0 and group % 2 == 0 and out_features % group == 0


def swap_pairs(z: Tensor, group: int) -> Tensor:
    """``(z1, z2) → (-z2, z1)`` for the halves of every ``group`` outputs."""
    first, second = z.view(*z.shape[:-1], -1, 2, group // 2).unbind(-2)
    return torch.stack((-second, first), dim=-2).view(z.shape)
