"""Adding up what adapters do to the embedding and to the output head: tables with a row a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.compose.share import Conflict, Share, weighted_sum, who
from server.adapters.ir import EmbedEdit, HeadEdit
from server.adapters.lower.base import Base


def compose_embedding(shares: Sequence[Share[EmbedEdit]], site: str, base: Base) -> EmbedEdit:
    """Low ranks side by side under ``1 + sum w (s - 1)``; replaced rows and whole tables evaluated. Raises Conflict."""
    wide = [Share(share.index, share.weight, _wide(share.edit, base.compute)) for share in shares]
    if any(share.edit.table is not None for share in wide):
        table = base.weight(site)
        return EmbedEdit(table=_evaluated(wide, torch.arange(table.shape[0]), table))
    total = EmbedEdit()
    ids = [share.edit.row_ids for share in wide if share.edit.row_ids is not None]
    if ids:
        total.row_ids = torch.unique(torch.cat(ids))
        total.rows = _evaluated(wide, total.row_ids, base.weight(site)[total.row_ids])
    scales = [(share.weight, share.edit.out_scale - 1) for share in wide if share.edit.out_scale is not None]
    if (difference := weighted_sum(scales)) is not None:
        total.out_scale = 1 + difference
    low_rank = [
        (edit.down, share.weight * edit.up, edit.out_scale)
        for share in wide
        if (edit := share.edit).down is not None and edit.up is not None
    ]
    if not low_rank:
        return total
    if total.out_scale is not None and not bool(total.out_scale.all()):
        raise Conflict(f"the scales of {who(wide)} add up to zero in a column, which leaves no place for their other changes")
    total.down = torch.cat([down for down, _, _ in low_rank], dim=1)
    ups = [up if scale is None else up * scale for _, up, scale in low_rank]
    total.up = torch.cat(ups) if total.out_scale is None else torch.cat(ups) / total.out_scale
    return total


def compose_head(shares: Sequence[Share[HeadEdit]], spec: SiteSpec, base: Base) -> HeadEdit:
    """``base + sum w (theirs - base)``, of the whole weight as soon as one adapter has it, else of the rows. Raises Conflict."""
    wide = [Share(share.index, share.weight, _as_embedding(share.edit, base.compute)) for share in shares]
    if spec.has_bias and any(share.edit.row_ids is not None for share in shares):
        raise Conflict(f"replaced rows of a head with a bias cannot be weighted ({who(shares)})")
    weight = base.weight(spec.name)
    if all(share.edit.table is None for share in wide):
        ids = torch.unique(torch.cat([share.edit.row_ids for share in wide if share.edit.row_ids is not None]))
        return HeadEdit(row_ids=ids, rows=_evaluated(wide, ids, weight[ids]))
    return HeadEdit(_evaluated(wide, torch.arange(weight.shape[0]), weight), _head_bias(shares, spec, base))


def _head_bias(shares: Sequence[Share[HeadEdit]], spec: SiteSpec, base: Base) -> Tensor | None:
    """A replaced weight without a bias has none, also where the base's head has one."""
    if not spec.has_bias and all(share.edit.bias is None for share in shares):
        return None
    total = start = base.bias(spec.name)
    for share in shares:
        if share.edit.weight is not None:
            total = total + share.weight * ((0 if share.edit.bias is None else share.edit.bias.to(base.compute)) - start)
    return total


def _evaluated(shares: Sequence[Share[EmbedEdit]], ids: Tensor, rows: Tensor) -> Tensor:
    """``(n, dim)``: the composed rows of these ids, from the base's ``rows`` of them."""
    total = rows.clone()
    for share in shares:
        total += share.weight * (_rows(share.edit, ids, rows) - rows)
    return total


def _rows(edit: EmbedEdit, ids: Tensor, rows: Tensor) -> Tensor:
    """What one adapter alone makes of the base's rows of these ids."""
    found = rows if edit.table is None else edit.table[ids]
    if edit.down is not None and edit.up is not None:
        found = found + edit.down[ids] @ edit.up
    if edit.out_scale is not None:
        found = found * edit.out_scale
    if edit.row_ids is not None and edit.rows is not None:
        place = torch.searchsorted(edit.row_ids, ids).clamp_(max=edit.row_ids.shape[0] - 1)
        found = torch.where((edit.row_ids[place] == ids)[:, None], edit.rows[place], found)
    return found


def _wide(edit: EmbedEdit, compute: torch.dtype) -> EmbedEdit:
    names = ("down", "up", "out_scale", "rows", "table")
    return EmbedEdit(
        row_ids=edit.row_ids, **{name: value.to(compute) for name in names if (value := getattr(edit, name)) is not None}
    )


def _as_embedding(edit: HeadEdit, compute: torch.dtype) -> EmbedEdit:
    """A head's weight is a table with a row a token, too."""
    return _wide(EmbedEdit(table=edit.weight, row_ids=edit.row_ids, rows=edit.rows), compute)
