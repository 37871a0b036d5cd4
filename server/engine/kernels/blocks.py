"""The linears of a block with what a step's programs do at them, and layers of such blocks, as ``blocks.cpp`` reads them. Knows sites and
records, not what a block computes.

A block takes the native way when all that its programs edit in it are linears; what comes after its last linear (bottlenecks) may be
anything. Otherwise its modules are called one by one.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from server.adapters.apply import StepEdits
from server.adapters.kernels import NativeRuns
from server.adapters.native_linear import NativeLinearWork
from server.adapters.sites import LinearSite
from server.engine.kernels.native import BlockLinears, LayerStack, PagedAttention
from server.engine.kernels.packed_linear import PackedLinear

_LINEAR = struct.Struct("11q")
_LAYER = struct.Struct("qdqd4q")


def block_linears(projections: Sequence[nn.Module], edits: StepEdits | None) -> BlockLinears | None:
    """A block's linears in their order for a step; None where one of them is no native linear, or has work between its neighbours and itself
    that the native kernels do not know."""
    records: list[bytes] = []
    held: list[object] = []
    addresses, out_features, num_rows = (0, 0), 0, 0
    for projection in projections:
        site = projection if isinstance(projection, LinearSite) else None
        base = projection if site is None else site.inner
        if not isinstance(base, PackedLinear) or (
            site is not None and site.sublayer is not None and projection is not projections[-1]
        ):
            return None
        work = None
        if edits is not None and site is not None:
            work = edits.linear(site.spec.name, base.in_features, base.out_features)
        if work is not None and not isinstance(work, NativeLinearWork):
            return None
        runs = (None, None) if work is None else (work.input_terms, work.output_terms)
        if work is not None:
            addresses = work.kernel.linear_addresses
        records.append(_LINEAR.pack(*base.addresses, base.in_features, base.out_features, *_side(runs[0]), *_side(runs[1])))
        num_rows = max([num_rows, *(side.end for side in runs if side is not None)])
        held += [base, *runs]
        out_features = base.out_features
    return BlockLinears(b"".join(records), struct.pack("2q", *addresses), out_features, num_rows, tuple(held))


class LayerParts(NamedTuple):
    """A decoder layer: the norms through which attention and MLP read the residual stream, each a weight ``(hidden,)`` in float32 and an
    epsilon, the linears of the two, and what the attention is."""

    norms: Sequence[tuple[Tensor, float]]
    attention: BlockLinears
    mlp: BlockLinears
    paged: PagedAttention


def layer_stack(layers: Sequence[LayerParts]) -> LayerStack:
    """Layers, at least one, that are run one after the other."""
    records = []
    for layer in layers:
        norms = [value for weight, eps in layer.norms for value in (weight.data_ptr(), eps)]
        blocks = [_address(data) for block in (layer.attention, layer.mlp) for data in (block.records, block.edits)]
        records.append(_LAYER.pack(*norms, *blocks) + layer.paged.record)
    num_rows = max(block.num_rows for layer in layers for block in (layer.attention, layer.mlp))
    return LayerStack(b"".join(records), len(layers), layers[0].paged.head_dim, num_rows, tuple(layers))


def _side(runs: NativeRuns | None) -> tuple[int, int, int]:
    return (0, 0, 0) if runs is None else (runs.num_runs, _address(runs.bounds), _address(runs.records))


def _address(data: bytes) -> int:
    """Where the bytes are, as long as they live."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
