"""Adding up what adapters do at one linear. Formulas: ``ir.LinearEdit``; with ``y0 = W x + b``, adapter i adds ``w_i (y_i - y0)``.

Terms that are added to ``y0`` add up. Scales of ``y0`` add up around 1. An input transform changes what everybody's scales would scale,
so that it must be alone: ``W (x + w (T x - x))``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.compose.share import Conflict, Share, weighted_sum, who
from server.adapters.ir import HeadEdit, LinearEdit


def compose_linear(
    shares: Sequence[Share[LinearEdit]], spec: SiteSpec, compute: torch.dtype, *, replaced_by: Sequence[Share[HeadEdit]] = ()
) -> LinearEdit:
    """One edit for all. ``replaced_by`` are the adapters that replace the linear itself (a head). Raises Conflict."""
    wide = [Share(share.index, share.weight, _wide(share.edit, compute)) for share in shares]
    total = LinearEdit(
        shift=weighted_sum((share.weight, share.edit.shift) for share in wide),
        dense=weighted_sum((share.weight, share.edit.dense) for share in wide),
    )
    low_rank = [
        (edit.down, share.weight * edit.up) for share in wide if (edit := share.edit).down is not None and edit.up is not None
    ]
    low_rank += _kronecker_terms(total, wide, spec)
    if low_rank:
        total.down, total.up = (torch.cat(matrices) for matrices in zip(*low_rank, strict=True))
    if not _keep_input_transform(total, wide, replaced_by):
        _add_scales(total, wide)
    return total


def _kronecker_terms(total: LinearEdit, shares: Sequence[Share[LinearEdit]], spec: SiteSpec) -> list[tuple[Tensor, Tensor]]:
    """Kronecker products into ``total``: one stays what it is; several are spelt out as low rank (returned) or dense, whichever is smaller."""
    found = [
        (share.weight * edit.left, edit.right)
        for share in shares
        if (edit := share.edit).left is not None and edit.right is not None
    ]
    if len(found) < 2:
        total.left, total.right = found[0] if found else (None, None)
        return []
    rank = sum(min(left.shape) * min(right.shape) for left, right in found)
    if total.dense is None and rank * (spec.in_features + spec.out_features) < spec.in_features * spec.out_features:
        return [_factors(left, right) for left, right in found]
    for left, right in found:
        product = torch.kron(left, right)
        total.dense = product if total.dense is None else total.dense.add_(product)
    return []


def _factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``left x right = (L1 x R1)(L2 x R2)``, where one of L1, L2 (R1, R2) is an identity of the smaller size: (down, up), exactly."""
    pairs = []
    for factor in (left, right):
        rows, columns = factor.shape
        identity = torch.eye(min(rows, columns), dtype=factor.dtype)
        pairs.append((identity, factor) if rows <= columns else (factor, identity))
    (left_out, left_in), (right_out, right_in) = pairs
    return torch.kron(left_in, right_in), torch.kron(left_out, right_out).T


def _keep_input_transform(total: LinearEdit, shares: Sequence[Share[LinearEdit]], replaced_by: Sequence[Share[HeadEdit]]) -> bool:
    """Whether one adapter changes the input of the base's linear, or the linear; ``total`` then has its transform and scales."""
    transforming = [share for share in shares if share.edit.in_scale is not None or share.edit.rotation is not None]
    scaling = [share for share in shares if share.edit.out_scale is not None or share.edit.pair_scale is not None]
    if len(transforming) > 1:
        raise Conflict(f"{who(transforming)} each transform this module's input")
    involved: list[Share[Any]] = [*transforming, *scaling, *replaced_by]
    if not transforming and not (replaced_by and scaling):
        return False
    if len({share.index for share in involved}) > 1:
        raise Conflict(f"{who(involved)}: one changes what the base computes here, and another would scale or change the result")
    only = (transforming or scaling)[0]
    if only.weight != 1.0 and (scaling or replaced_by):
        raise Conflict(f"{who([only])} both changes what the base computes here and scales it, which has no weight but 1")
    edit = only.edit
    total.out_scale, total.pair_scale, total.pair_group = edit.out_scale, edit.pair_scale, edit.pair_group
    if only.weight == 1.0:
        total.in_scale, total.rotation = edit.in_scale, edit.rotation
    elif edit.rotation is None and edit.in_scale is not None:
        total.in_scale = 1 + only.weight * (edit.in_scale - 1)
    elif edit.rotation is not None:
        rotation = edit.rotation
        size = rotation.shape[-1]
        if edit.in_scale is not None:
            rotation = edit.in_scale.view(-1, size, 1) * rotation
        identity = torch.eye(size, dtype=rotation.dtype)
        total.rotation = identity + only.weight * (rotation - identity)
    return True


def _add_scales(total: LinearEdit, shares: Sequence[Share[LinearEdit]]) -> None:
    """``1 + sum w (s - 1)`` and ``sum w c``."""
    scales = [(share.weight, share.edit.out_scale - 1) for share in shares if share.edit.out_scale is not None]
    if (difference := weighted_sum(scales)) is not None:
        total.out_scale = 1 + difference
    paired = [share for share in shares if share.edit.pair_scale is not None]
    if len({share.edit.pair_group for share in paired}) > 1:
        raise Conflict(f"{who(paired)} pair this module's outputs differently")
    total.pair_scale = weighted_sum((share.weight, share.edit.pair_scale) for share in paired)
    total.pair_group = paired[0].edit.pair_group if paired else 0


def _wide(edit: LinearEdit, compute: torch.dtype) -> LinearEdit:
    names = ("down", "up", "in_scale", "out_scale", "shift", "dense", "rotation", "pair_scale", "left", "right")
    tensors = {name: value.to(compute) for name in names if (value := getattr(edit, name)) is not None}
    return LinearEdit(**tensors, pair_group=edit.pair_group)
