"""Executing bottlenecks at a sub-layer's output, and attention over several of them. The meaning is ``ir.BottleneckEdit``'s.

Bottlenecks with one placement form a group that one kernel call serves, whoever owns the rows; rows with a fusion go run by run.
``bottleneck_reference`` and ``fusion_reference`` state the maths for one program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from server.adapters.packed import BottleneckLayout, SiteLayout
from server.adapters.rows import NORM_EPS, VectorRows, add_rows, norm_rows, pick, row_index, shift_rows


class Streams:
    """The vectors that meet at a sub-layer's output, each ``(N, hidden)`` and computed when somebody asks.

    ``residual`` may be None where no program of the step reads it. ``normed`` gives the norm of the sum, on post-norm bases.
    """

    def __init__(self, sublayer: Tensor, residual: Tensor | None, normed: Callable[[], Tensor] | None = None) -> None:
        self.sublayer = sublayer
        self._residual = residual
        self._normed = normed
        self._known: dict[str, Tensor] = {"sublayer": sublayer}

    def get(self, name: str) -> Tensor:
        """A stream of ``ir.Stream`` by name."""
        if name not in self._known:
            self._known[name] = self._make(name)
        return self._known[name]

    def rows(self, start: int, end: int) -> Streams:
        """The same streams of some rows only."""
        part = Streams(self.sublayer[start:end], None if self._residual is None else self._residual[start:end])
        if self._normed is not None:
            part._normed = lambda: self.get("normed")[start:end]
        return part

    def _make(self, name: str) -> Tensor:
        if name == "normed" and self._normed is not None:
            return self._normed()
        if self._residual is None:
            raise RuntimeError(f"the {name} stream is not known at this site")
        return self._residual if name == "residual" else self.sublayer + self._residual


@dataclass(frozen=True, slots=True)
class Group:
    """The bottlenecks of a step that share a placement at one site, at most one a row. ``rows``: theirs, None for all."""

    placement: Placement
    rows: Tensor | None
    work: LowRankWork
    up_bias: VectorRows | None
    before_weight: VectorRows | None
    before_bias: VectorRows | None
    after_weight: VectorRows | None
    after_bias: VectorRows | None
    weight: Tensor | None
    """``(n, 1)`` where some row's is not 1."""


@dataclass(frozen=True, slots=True)
class SublayerWork:
    """What a step's programs do at one sub-layer's output."""

    groups: tuple[Group, ...]
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
        return _make_work(edits, here, hidden) if here else None

    return edits.once(f"{site} output", make)


def run_sublayer(work: SublayerWork, streams: Streams, vectors: Tensor) -> SublayerResult:
    """All bottlenecks of a step at one site. Rows without any keep ``streams.sublayer``; edits of one row add their differences."""
    t = streams.sublayer.clone()
    whole = []
    for group in work.groups:
        if _run_group(group, streams, vectors, t):
            whole.append(group.rows)
    for start, end, children, fusion in work.fusions:
        t[start:end] = fusion_reference(children, fusion, streams.rows(start, end)).to(t.dtype)
        if fusion.placement.replaces:
            whole.append(torch.arange(start, end, device=t.device))
    return SublayerResult(t, tuple(whole))


def _run_group(group: Group, streams: Streams, vectors: Tensor, t: Tensor) -> bool:
    """Change the group's rows of ``t``. Whether they replace what the base does after the sub-layer."""
    placement = group.placement
    source = streams.get(placement.source)
    if group.before_weight is not None:
        source = norm_rows(source, vectors, group.before_weight, group.before_bias)
    if placement.is_plain and group.after_weight is None and group.weight is None:
        group.work.add(t, source)
        if group.up_bias is not None:
            shift_rows(t, vectors, group.up_bias)
        return False
    u = torch.zeros_like(t)
    group.work.add(u, source)
    if group.up_bias is not None:
        shift_rows(u, vectors, group.up_bias)
    residual = streams.get(placement.residual)
    if not placement.norm_first:
        add_rows(u, pick(residual, group.rows), group.rows)
    if group.after_weight is not None:
        u = norm_rows(u, vectors, group.after_weight, group.after_bias)
    if placement.norm_first:
        add_rows(u, pick(residual, group.rows), group.rows)
    difference = pick(u, group.rows) - pick(streams.sublayer, group.rows)
    add_rows(t, difference if group.weight is None else difference * group.weight.to(difference.dtype), group.rows)
    return placement.replaces


def _make_work(edits: StepEdits, here: list[tuple[Resident, int, int, SiteLayout]], hidden: int) -> SublayerWork:
    members: dict[tuple[Any, ...], list[tuple[Resident, int, int, BottleneckLayout]]] = {}
    fusions = []
    for resident, start, end, layout in here:
        if "fusion.placement" in layout.flags:
            fusions.append((start, end, *_fusion(edits.bank, resident, layout, hidden)))
            continue
        for ordinal, item in enumerate(layout.bottlenecks):
            # A row's second bottleneck goes into a group of its own: within a kernel call every row is written once.
            key = (item.placement, ordinal, item.before_weight is None, item.after_weight is None)
            members.setdefault(key, []).append((resident, start, end, item))
    groups = tuple(_group(edits, key[0], found, hidden) for key, found in members.items())
    return SublayerWork(groups, tuple(fusions))


def _group(
    edits: StepEdits, placement: Placement, members: list[tuple[Resident, int, int, BottleneckLayout]], hidden: int
) -> Group:
    def vectors(name: str) -> VectorRows | None:
        return edits.vectors_of([(resident, start, end, getattr(item, name)) for resident, start, end, item in members])

    device = edits.bank.rows.device
    work = edits.low_rank(
        [Placed(resident, start, end, item, item.down_bias) for resident, start, end, item in members],
        hidden,
        hidden,
        placement.activation,
    )
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
    """A fusion and its children as edits, whose tensors are views of the bank's. A child's own residual and last norm have no say."""

    def vector(offset: int | None, length: int) -> Tensor | None:
        start = resident.vectors_offset + (offset or 0)
        return None if offset is None else bank.vectors[start : start + length]

    def matrix(offset: int, rank: int) -> Tensor:
        start = resident.rows_offset + offset
        return bank.rows[start : start + rank * hidden].view(rank, hidden)

    children = tuple(
        BottleneckEdit(
            item.placement,
            matrix(item.down, item.rank),
            matrix(item.up, item.rank),
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
