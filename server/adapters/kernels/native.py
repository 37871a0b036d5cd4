"""The native kernels of edits: built once with the machine's compiler, and left out where there is none.

They read every weight where it lies and copy none, which is what bounds a decode step with many adapters, and take all rows of a step in
one call, however many programs and terms there are.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from server.adapters.kernels.build import build_library, load_library

SOURCES = tuple(Path(__file__).with_name(name) for name in ("linear.cpp",))
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_LINEAR_BEFORE = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 3 + [ctypes.c_char_p] * 2
_LINEAR_AFTER = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 4 + [ctypes.c_char_p] * 2

log = logging.getLogger(__name__)


class NativeRuns(NamedTuple):
    """Runs of rows and one record of addresses each, as the C++ reads them: ``bounds`` are pairs of int64 in ascending order."""

    num_runs: int
    bounds: bytes
    records: bytes


def join_runs(runs: Sequence[tuple[int, int, bytes]]) -> NativeRuns | None:
    """From (start, end, record) in the order of rows; None when there are none."""
    if not runs:
        return None
    bounds = struct.pack(f"{2 * len(runs)}q", *(bound for start, end, _ in runs for bound in (start, end)))
    return NativeRuns(len(runs), bounds, b"".join([record for _, _, record in runs]))


class NativeEdits:
    """Edits on rows of one dtype on the CPU. Raises OSError when the library does not load."""

    def __init__(self, library: Path, dtype: torch.dtype) -> None:
        loaded, suffix = load_library(library), _SUFFIXES[dtype]
        self._dtype = dtype
        self._linear_before = getattr(loaded, f"linear_before_{suffix}")
        self._linear_after = getattr(loaded, f"linear_after_{suffix}")
        for function, arguments in ((self._linear_before, _LINEAR_BEFORE), (self._linear_after, _LINEAR_AFTER)):
            function.argtypes, function.restype = arguments, None

    def linear_before(self, x: Tensor, runs: NativeRuns) -> Tensor:
        """``rotate(in_scale * x)`` of the runs beside the other rows of ``x (N, in)`` as they are."""
        x = self._rows(x)
        out = torch.empty_like(x)
        self._linear_before(x.data_ptr(), out.data_ptr(), *x.shape, *runs)
        return out

    def linear_after(self, y: Tensor, x: Tensor, runs: NativeRuns) -> Tensor:
        """The base's output ``y (N, out)`` with the runs' other terms on ``x (N, in)``; ``y`` may be changed."""
        x, y = self._rows(x), self._rows(y)
        self._linear_after(x.data_ptr(), y.data_ptr(), *x.shape, y.shape[1], *runs)
        return y

    def _rows(self, rows: Tensor) -> Tensor:
        if rows.dtype != self._dtype or rows.device.type != "cpu":
            raise ValueError(f"the native kernel is for {self._dtype} on the CPU, not {rows.dtype} on {rows.device}")
        return rows.contiguous()


def load_native(cache_dir: Path, dtype: torch.dtype, device: torch.device) -> NativeEdits | None:
    """The kernels for a dtype, built on first use; None where they cannot be had, which costs speed and nothing else."""
    if device.type != "cpu" or dtype not in _SUFFIXES:
        return None
    try:
        return NativeEdits(build_library(SOURCES, cache_dir, "edits"), dtype)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        log.warning("the native kernels cannot be built or loaded, so the slower PyTorch ones run: %s", error)
        return None
