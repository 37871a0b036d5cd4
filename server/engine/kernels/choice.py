"""Which kernels an engine runs: the fastest that its device and dtype allow, PyTorch's operations where there are none."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

import torch

from server.adapters.kernels import Kernel, load_triton
from server.adapters.kernels import load_native as load_low_rank
from server.adapters.kernels.gpu import runs_triton
from server.engine.kernels.gathered import GatheredAttention
from server.engine.kernels.native import Native, load_native
from server.engine.kernels.paged import AttentionKernel


@dataclass(frozen=True, slots=True)
class Kernels:
    """``low_rank`` None: PyTorch's operations, whichever suit the step. ``native`` None: the base's modules stay as they are."""

    low_rank: Kernel | None
    native: Native | None
    attention: AttentionKernel


def choose_kernels(directory: str, dtype: torch.dtype, device: torch.device, *, low_rank: Kernel | None = None) -> Kernels:
    """Kernels for a CPU are compiled into ``directory`` on first use; empty: none are. A given ``low_rank`` is taken, for tests that compare."""
    native = load_native(Path(directory), dtype, device) if directory else None
    if low_rank is None:
        low_rank = load_low_rank(Path(directory), dtype, device) if directory else None
    if low_rank is None:
        low_rank = load_triton(dtype, device)
    return Kernels(low_rank, native, _attention(native, dtype, device))


def _attention(native: Native | None, dtype: torch.dtype, device: torch.device) -> AttentionKernel:
    if native is not None:
        return native.attention
    if runs_triton(dtype, device):
        return importlib.import_module("server.engine.kernels.triton_attention").attention_triton  # type: ignore[no-any-return]
    return GatheredAttention()
