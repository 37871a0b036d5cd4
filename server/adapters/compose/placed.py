"""Adding up what adapters do beside the base's modules: bottlenecks, fusions, side attention and interventions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from server.adapters.compose.share import Conflict, Share, who
from server.adapters.ir import BottleneckEdit, Edit, FusionEdit, InterventionEdit, SideEdit


def compose_bottlenecks(here: Sequence[Share[list[Edit]]]) -> list[Edit]:
    """All bottlenecks of a site, with their weights; a fusion only with the bottlenecks that it was made for. Raises Conflict."""
    found = [
        Share(share.index, share.weight, edit)
        for share in here
        for edit in share.edit
        if isinstance(edit, BottleneckEdit | FusionEdit)
    ]
    fusions = [share for share in found if isinstance(share.edit, FusionEdit)]
    if fusions and len({share.index for share in found}) > 1:
        raise Conflict(f"{who(fusions)} fuses the bottlenecks here, and {who(found)} have some; a fusion is for its own only")
    whole = [share for share in found if share.edit.placement.replaces]
    if whole and len(here) > 1:
        raise Conflict(f"{who(whole)} replaces all that leaves this sub-layer, and {who(here)} have edits here")
    if any(share.weight != 1.0 for share in [*fusions, *whole]):
        raise Conflict(f"the fusion or the replacing bottleneck here has no weight but 1 ({who([*fusions, *whole])})")
    return [_weighted(share.edit, share.weight) for share in found]


def compose_side(shares: Sequence[Share[SideEdit]], compute: torch.dtype) -> SideEdit:
    """One adapter's side attention; what it adds is linear in its values. Raises Conflict."""
    if len(shares) > 1:
        raise Conflict(f"{who(shares)} each attend to keys of their own here, under one softmax each")
    edit = shares[0].edit
    return replace(edit, value=shares[0].weight * edit.value.to(compute))


def compose_intervention(shares: Sequence[Share[InterventionEdit]], compute: torch.dtype) -> InterventionEdit:
    """One adapter's intervention; a weight only where its last projection stands alone. Raises Conflict."""
    if len(shares) > 1:
        raise Conflict(f"{who(shares)} each change this layer's output in a subspace, one after the other")
    share = shares[0]
    if share.edit.subtracts and share.weight != 1.0:
        raise Conflict(f"the intervention of {who(shares)} projects with one matrix twice, and so has no weight but 1")
    return replace(share.edit, project=share.weight * share.edit.project.to(compute))


def _weighted(edit: BottleneckEdit | FusionEdit, weight: float) -> Edit:
    """A bottleneck that is just an addition is scaled; any other counts with a weight."""
    if isinstance(edit, FusionEdit) or weight == 1.0:
        return edit
    if edit.placement.is_plain and edit.after_weight is None and edit.after_bias is None:
        bias = None if edit.up_bias is None else weight * edit.up_bias
        return replace(edit, up=weight * edit.up, up_bias=bias)
    return replace(edit, weight=weight * edit.weight)
