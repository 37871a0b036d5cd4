"""The bottlenecks of a step at one sub-layer's output, for the native kernel: one call for all placements and ranks.

Knows where a program's tensors lie and the layout that ``kernels/bottleneck.cpp`` reads; the meaning is ``ir.BottleneckEdit``'s, and
``bottleneck.Group`` does the same in PyTorch, also with the activations that the kernel lacks.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from server.adapters.bank import Resident
from server.adapters.kernels import NativeEdits, NativeRuns, join_runs
from server.adapters.native_records import NativeRecords
from server.adapters.packed import BottleneckLayout
from server.adapters.rows import NORM_EPS
from server.adapters.streams import Streams

_RECORD = struct.Struct("14q2d")
_STREAMS = {"sublayer": 0, "residual": 1, "sum": 2, "normed": 3}
_ACTIVATIONS = {"linear": 0, "relu": 1, "gelu": 2, "gelu_new": 3, "gelu_pytorch_tanh": 3, "silu": 4, "swish": 4, "tanh": 5}


class Member(NamedTuple):
    """Rows ``[start, end)`` and the bottleneck that acts on them."""

    resident: Resident
    start: int
    end: int
    layout: BottleneckLayout


@dataclass(frozen=True, slots=True)
class NativeGroup:
    """Bottlenecks of any kind, at most one a row. ``whole``: rows of those that replace what the base does after the sub-layer."""

    kernel: NativeEdits
    runs: NativeRuns
    reads_residual: bool
    reads_normed: bool
    whole: tuple[Tensor, ...]

    def run(self, streams: Streams, vectors: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Change the rows of ``t``; ``vectors`` are known by their addresses. The rows that are whole."""
        residual = streams.get("residual") if self.reads_residual else None
        normed = streams.get("normed") if self.reads_normed else None
        self.kernel.bottlenecks(t, streams.sublayer, residual, normed, self.runs)
        return self.whole


def is_native(layout: BottleneckLayout) -> bool:
    """Whether the kernel has the activation: rare ones are not worth C++ of their own."""
    return layout.placement.activation in _ACTIVATIONS


def native_group(records: NativeRecords, members: Sequence[Member]) -> NativeGroup:
    """The group of bottlenecks in the order of their rows."""

    def record(member: Member) -> bytes:
        return records.once(member.resident, f"bottleneck {member.layout.down}", lambda: _pack(records, member))

    runs = join_runs([(member.start, member.end, record(member)) for member in members])
    assert runs is not None, "a group has members"
    placements = {member.layout.placement for member in members}
    read = {name for placement in placements for name in (placement.source, placement.residual)}
    return NativeGroup(
        records.kernel,
        runs,
        reads_residual=not read.isdisjoint(("residual", "sum")),
        reads_normed="normed" in read,
        whole=tuple(torch.arange(start, end) for _, start, end, layout in members if layout.placement.replaces),
    )


def _pack(records: NativeRecords, member: Member) -> bytes:
    resident, layout, placement = member.resident, member.layout, member.layout.placement
    vectors = (
        layout.down_bias,
        layout.up_bias,
        layout.before_weight,
        layout.before_bias,
        layout.after_weight,
        layout.after_bias,
    )
    return _RECORD.pack(
        records.matrix(resident, layout.down),
        records.matrix(resident, layout.up),
        layout.rank,
        records.is_bf16(resident),
        *(records.vector(resident, offset) for offset in vectors),
        _STREAMS[placement.source],
        _STREAMS[placement.residual],
        int(placement.norm_first),
        _ACTIVATIONS[placement.activation],
        layout.weight,
        NORM_EPS,
    )
