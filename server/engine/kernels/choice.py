"""Which kernels an engine runs: the fastest that its device and dtype allow, PyTorch's operations where there are none."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from server.adapters.kernels import Kernel, SlotKernels, load_triton
from server.adapters.kernels import load_native as load_native_edits
from server.adapters.kernels.gpu import runs_triton
from server.engine.kernels.gathered import GatheredAttention
from server.engine.kernels.graph import CudaGraphs, Graph
from server.engine.kernels.native import Native, load_native
from server.engine.kernels.paged import AttentionKernel


@dataclass(frozen=True, slots=True)
class Kernels:
    """``edits`` None: PyTorch's operations, whichever suit the step. ``native`` None: the base's modules stay as they are. ``make_graph``:
    what records decode steps; None where nothing does, or some kernel of a step cannot be recorded."""

    edits: Kernel | None
    native: Native | None
    attention: AttentionKernel
    make_graph: Callable[[], Graph] | None


def choose_kernels(directory: str, dtype: torch.dtype, device: torch.device, *, edits: Kernel | None = None) -> Kernels:
    """Kernels for a CPU are compiled into ``directory`` on first use; empty: none are. Given ``edits`` are taken, for tests that compare."""
    native = load_native(Path(directory), dtype, device) if directory else None
    if edits is None:
        edits = load_native_edits(Path(directory), dtype, device) if directory else None
    if edits is None:
        edits = load_triton(dtype, device)
    records = isinstance(edits, SlotKernels) and runs_triton(dtype, device)
    return Kernels(edits, native, _attention(native, dtype, device), CudaGraphs() if records else None)


def _attention(native: Native | None, dtype: torch.dtype, device: torch.device) -> AttentionKernel:
    if native is not None:
        return native.attention
    if runs_triton(dtype, device):
        return importlib.import_module("server.engine.kernels.triton_attention").attention_triton  # type: ignore[no-any-return]
    return GatheredAttention()
