"""Executing bottlenecks at a sub-layer's output, and attention over several of them. The meaning is ``ir.BottleneckEdit``'s.

On the native kernel one call serves all bottlenecks of a step that it knows; by slot one call serves those of a kind. In PyTorch those with
one placement form a group that one kernel call serves, whoever owns the rows; rows with a fusion go run by run.
``bottleneck_reference`` and ``fusion_reference`` state the maths for one program.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from server.adapters.activations import ACTIVATIONS
from server.adapters.apply import Placed, StepEdits
from server.adapters.bank import Bank, Resident
from server.adapters.ir import BottleneckEdit, FusionEdit, Placement
from server.adapters.linear import LowRankWork
from server.adapters.native_bottleneck import Member, NativeGroup, is_native, native_group
from server.adapters.packed import SiteLayout
from server.adapters.rows import NORM_EPS, VectorRows, add_rows, norm_rows, pick, row_index, shift_rows
from server.adapters.slot_bottleneck import SlotGroup
from server.adapters.slot_rows import SlotRows
from server.adapters.slot_table import has_place
from server.adapters.streams import Streams


@dataclass(frozen=True, slots=True)
class Group:
    """The bottlenecks of a step that share a placement at one site, at most one a row, in PyTorch. ``rows``: theirs, None for all."""

    placement: Placement
    rows: Tensor | None
    work: LowRankWork | SlotRows
    up_bias: VectorRows | None
    before_weight: VectorRows | None
    before_bias: VectorRows | None
    after_weight: VectorRows | None
    after_bias: VectorRows | None
    weight: Tensor | None
    """``(n, 1)`` where some row's is not 1."""

    def run(self, streams: Streams, vectors: Tensor, t: Tensor) -> tuple[Tensor | None, ...]:
        """Change the rows of ``t``. Those (None for all) that replace what the base does after the sub-layer."""
        placement = self.placement
        source = streams.get(placement.source)
        if self.before_weight is not None:
            source = norm_rows(source, vectors, self.before_weight, self.before_bias)
        if placement.is_plain and self.after_weight is None and self.weight is None:
            self.work.add(t, source)
            if self.up_bias is not None:
                shift_rows(t, vectors, self.up_bias)
            return ()
        u = torch.zeros_like(t)
        self.work.add(u, source)
        if self.up_bias is not None:
            shift_rows(u, vectors, self.up_bias)
        residual = streams.get(placement.residual)
        if not placement.norm_first:
            add_rows(u, pick(residual, self.rows), self.rows)
        if self.after_weight is not None:
            u = norm_rows(u, vectors, self.after_weight, self.after_bias)
        if placement.norm_first:
            add_rows(u, pick(residual, self.rows), self.rows)
        difference = pick(u, self.rows) - pick(streams.sublayer, self.rows)
        add_rows(t, difference if self.weight is None else difference * self.weight.to(difference.dtype), self.rows)
        return (self.rows,) if placement.replaces else ()


@dataclass(frozen=True, slots=True)
class SublayerWork:
    """What a step's programs do at one sub-layer's output."""

    groups: tuple[Group | NativeGroup | SlotGroup, ...]
    fusions: tuple[tuple[int, int, tuple[BottleneckEdit, ...], FusionEdit], ...]


@dataclass(frozen=True, slots=True)
class SublayerResult:
    """``t (N, hidden)`` in place of the sub-layer's output. ``whole``: rows (None for all) whose ``t`` already is what the layer goes on
    with: no residual and no norm is to be applied to them any more."""

    t: Tensor
    whole: tuple[Tensor | None, ...] = ()


def sublayer_work(edits: StepEdits, site: str, hidden: int) -> SublayerWork | None:
    """The work at a sub-layer's output, made on first use; None when no program of the step has a bottleneck there."""

    def make() -> SublayerWork | None:
        here = [item for item in edits.at(site) if item[3].bottlenecks]
        return _make_work(edits, site, here, hidden) if here else None

    return edits.once(f"{site} output", make)


def run_sublayer(work: SublayerWork, streams: Streams, vectors: Tensor) -> SublayerResult:
    """All bottlenecks of a step at one site. Rows without any keep ``streams.sublayer``; edits of one row add their differences."""
    t = streams.sublayer.clone()
    whole: list[Tensor | None] = []
    for group in work.groups:
        whole += group.run(streams, vectors, t)
    for start, end, children, fusion in work.fusions:
        t[start:end] = fusion_reference(children, fusion, streams.rows(start, end)).to(t.dtype)
        if fusion.placement.replaces:
            whole.append(torch.arange(start, end, device=t.device))
    return SublayerResult(t, tuple(whole))


def _make_work(edits: StepEdits, site: str, here: list[tuple[Resident, int, int, SiteLayout]], hidden: int) -> SublayerWork:
    members: dict[tuple[Any, ...], list[Member]] = {}
    native: dict[int, list[Member]] = {}
    fusions = []
    for resident, start, end, layout in here:
        if "fusion.placement" in layout.flags:
            fusions.append((start, end, *_fusion(edits.bank, resident, layout, hidden)))
            continue
        if edits.slots is not None and has_place(layout):
            continue
        # A row's second bottleneck goes into a group of its own: within a kernel call every row is written once.
        for ordinal, item in enumerate(layout.bottlenecks):
            if edits.records is not None and is_native(item):
                native.setdefault(ordinal, []).append(Member(resident, start, end, item))
            else:
                key = (item.placement, ordinal, item.before_weight is None, item.after_weight is None)
                members.setdefault(key, []).append(Member(resident, start, end, item))
    groups = [_group(edits, key[0], found, hidden) for key, found in members.items()]
    natives = [native_group(edits.records, found) for found in native.values()] if edits.records is not None else []
    by_slot = edits.slots.bottlenecks(site) if edits.slots is not None else []
    return SublayerWork((*groups, *natives, *by_slot), tuple(fusions))


def _group(edits: StepEdits, placement: Placement, members: list[Member], hidden: int) -> Group:
    def vectors(name: str) -> VectorRows | None:
        return edits.vectors_of([(resident, start, end, getattr(item, name)) for resident, start, end, item in members])

    device = edits.bank.rows.device
    placed = [Placed(resident, start, end, item, item.down_bias) for resident, start, end, item in members]
    work = edits.slots.aside(members) if edits.slots is not None else edits.low_rank(placed, hidden, hidden, placement.activation)
    assert work is not None, "a bottleneck has at least one inner unit"
    weights = [item.weight for _, start, end, item in members for _ in range(start, end)]
    return Group(
        placement,
        row_index([row for _, start, end, _ in members for row in range(start, end)], edits.num_rows, device),
        work,
        **{name: vectors(name) for name in ("up_bias", "before_weight", "before_bias", "after_weight", "after_bias")},
        weight=None if set(weights) == {1.0} else torch.tensor(weights, device=device)[:, None],
    )


def _fusion(bank: Bank, resident: Resident, layout: SiteLayout, hidden: int) -> tuple[tuple[BottleneckEdit, ...], FusionEdit]:
    """A fusion and its children as edits, whose tensors are the bank's. A child's own residual and last norm have no say."""

    def vector(offset: int | None, length: int) -> Tensor | None:
        start = resident.vectors_offset + (offset or 0)
        return None if offset is None else bank.vectors[start : start + length]

    children = tuple(
        BottleneckEdit(
            item.placement,
            bank.matrix(resident, item.down, item.rank, hidden),
            bank.matrix(resident, item.up, item.rank, hidden),
            vector(item.down_bias, item.rank),
            vector(item.up_bias, hidden),
            vector(item.before_weight, hidden),
            vector(item.before_bias, hidden),
        )
        for item in layout.bottlenecks
    )
    tensors = {
        name.removeprefix("fusion."): resident.extras[key] for name, key in layout.extras.items() if name.startswith("fusion.")
    }
    return children, FusionEdit(Placement(**layout.flags["fusion.placement"]), **tensors)


def bottleneck_reference(edit: BottleneckEdit, streams: Streams) -> Tensor:
    """``t`` of one bottleneck for all rows, exactly as ``ir.Placement`` reads."""
    placement = edit.placement
    u = _inner(edit, streams)
    residual = streams.get(placement.residual)
    if placement.norm_first:
        t = _norm(u, edit.after_weight, edit.after_bias) + residual
    else:
        t = _norm(u + residual, edit.after_weight, edit.after_bias)
    return streams.sublayer + edit.weight * (t - streams.sublayer)


def fusion_reference(children: Sequence[BottleneckEdit], fusion: FusionEdit, streams: Streams) -> Tensor:
    """``t`` of a fusion for all rows: attention of each row's query over its children's outputs."""
    placement = fusion.placement
    outputs = torch.stack([_inner(child, streams) for child in children], dim=1)
    query = _project(streams.get(placement.source), fusion.query, fusion.query_bias)
    scores = (_project(outputs, fusion.key, fusion.key_bias) @ query[:, :, None])[..., 0]
    chosen = (torch.softmax(scores, dim=-1)[:, None, :] @ _project(outputs, fusion.value, None))[:, 0]
    residual = streams.get(placement.residual)
    if placement.norm_first:
        return _norm(chosen, fusion.after_weight, fusion.after_bias) + residual
    return _norm(chosen + residual, fusion.after_weight, fusion.after_bias)


def _inner(edit: BottleneckEdit, streams: Streams) -> Tensor:
    x = _norm(streams.get(edit.placement.source), edit.before_weight, edit.before_bias)
    inner = ACTIVATIONS[edit.placement.activation](_project(x, edit.down, edit.down_bias))
    return _project(inner, edit.up.T, edit.up_bias)


def _project(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return x
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return x
    wide = F.layer_norm(x.to(weight.dtype), (x.shape[-1],), weight, bias, NORM_EPS)
    return wide.to(x.dtype)
