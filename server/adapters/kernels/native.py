"""The native low-rank kernel: built once with the machine's compiler, and left out where there is none.

It reads every adapter weight exactly once and copies none, which is what bounds a decode step with many adapters.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from server.adapters.kernels.build import build_library, load_library
from server.adapters.kernels.lowrank import LowRankRows, lowrank_gather

SOURCES = (Path(__file__).with_name("lowrank.cpp"),)
_ENTRIES = {torch.float32: "lowrank_f32", torch.bfloat16: "lowrank_bf16"}

_ACTIVATIONS = {"linear": 0, "relu": 1, "gelu": 2, "gelu_new": 3, "gelu_pytorch_tanh": 3, "silu": 4, "swish": 4, "tanh": 5}
"""Codes of lowrank.cpp."""

log = logging.getLogger(__name__)


class NativeLowRank:
    """``lowrank_reference`` on contiguous CPU tensors of one dtype; activations that lowrank.cpp lacks take ``lowrank_gather``.

    Raises OSError when the library does not load.
    """

    def __init__(self, library: Path, dtype: torch.dtype) -> None:
        self._function = getattr(load_library(library), _ENTRIES[dtype])
        self._function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3 + [ctypes.c_void_p] * 6 + [ctypes.c_int64]
        self._function.restype = None

    def __call__(self, y: Tensor, x: Tensor, down: Tensor, up: Tensor, index: LowRankRows) -> None:
        if not (x.is_contiguous() and y.is_contiguous()):
            raise ValueError("the native kernel needs contiguous rows")
        code = _ACTIVATIONS.get(index.activation)
        if code is None:
            # Rare activations are not worth C++ of their own.
            lowrank_gather(y, x, down, up, index)
            return
        self._function(
            down.data_ptr(),
            up.data_ptr(),
            x.data_ptr(),
            y.data_ptr(),
            index.ranks.shape[0],
            x.shape[1],
            y.shape[1],
            None if index.rows is None else index.rows.data_ptr(),
            index.first_down.data_ptr(),
            index.first_up.data_ptr(),
            index.ranks.data_ptr(),
            index.offsets.data_ptr(),
            None if index.bias is None else index.bias.data_ptr(),
            code,
        )


def load_native(cache_dir: Path, dtype: torch.dtype, device: torch.device) -> NativeLowRank | None:
    """The kernel for a dtype, built on first use; None where it cannot be had, which costs speed and nothing else."""
    if device.type != "cpu" or dtype not in _ENTRIES:
        return None
    try:
        return NativeLowRank(build_library(SOURCES, cache_dir, "lowrank"), dtype)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        log.warning("the native kernel cannot be built or loaded, so the slower PyTorch kernels run: %s", error)
        return None
