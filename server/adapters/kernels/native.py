"""The native kernels of edits: built once with the machine's compiler, and left out where there is none.

They read every weight where it lies and copy none, which is what bounds a decode step with many adapters, and take all rows of a step in
one call, however many programs and terms there are.
"""

from __future__ import annotations

import ctypes
import logging
import math
import struct
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from server.adapters.kernels.build import build_library, load_library

SOURCES = tuple(Path(__file__).with_name(name) for name in ("linear.cpp", "bottleneck.cpp", "norm.cpp"))
_SUFFIXES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_POINTER, _INT64, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
_RUNS = [ctypes.c_int64, ctypes.c_char_p, ctypes.c_char_p]
_ARGUMENTS = {
    "linear_before": [_POINTER] * 2 + [_INT64] * 2 + _RUNS,
    "linear_after": [_POINTER] * 2 + [_INT64] * 3 + _RUNS,
    "bottlenecks": [_POINTER] * 4 + [_INT64] * 2 + _RUNS,
    "norms": [_POINTER] * 2 + [_INT64] * 4 + [_DOUBLE] * 2 + _RUNS,
}

log = logging.getLogger(__name__)


class NativeRuns(NamedTuple):
    """Runs of rows and one record of addresses each, as the C++ reads them: ``bounds`` are pairs of int64 in ascending order, up to ``end``."""

    num_runs: int
    bounds: bytes
    records: bytes
    end: int


def join_runs(runs: Sequence[tuple[int, int, bytes]]) -> NativeRuns | None:
    """From (start, end, record) in the order of rows; None when there are none."""
    if not runs:
        return None
    bounds = struct.pack(f"{2 * len(runs)}q", *(bound for start, end, _ in runs for bound in (start, end)))
    return NativeRuns(len(runs), bounds, b"".join([record for _, _, record in runs]), runs[-1][1])


class NativeEdits:
    """Edits on rows of one dtype on the CPU. Raises OSError when the library does not load."""

    def __init__(self, library: Path, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._linear_before, self._linear_after, self._bottlenecks, self._norms = _functions(library, _SUFFIXES[dtype])

    @cached_property
    def linear_addresses(self) -> tuple[int, int]:
        """Where the functions behind ``linear_before`` and ``linear_after`` are, for kernels that call them between operations of their own."""
        before, after = (
            ctypes.cast(function, ctypes.c_void_p).value or 0 for function in (self._linear_before, self._linear_after)
        )
        return before, after

    def linear_before(self, x: Tensor, runs: NativeRuns) -> Tensor:
        """``rotate(in_scale * x)`` of the runs beside the other rows of ``x (N, in)`` as they are."""
        x = self._rows(x, runs)
        out = torch.empty_like(x)
        self._linear_before(x.data_ptr(), out.data_ptr(), *x.shape, *runs[:3])
        return out

    def linear_after(self, y: Tensor, x: Tensor, runs: NativeRuns) -> Tensor:
        """The base's output ``y (N, out)`` with the runs' other terms on ``x (N, in)``; ``y`` may be changed."""
        x, y = self._rows(x, runs), self._rows(y)
        self._linear_after(x.data_ptr(), y.data_ptr(), *x.shape, y.shape[1], *runs[:3])
        return y

    def bottlenecks(self, t: Tensor, sublayer: Tensor, residual: Tensor | None, normed: Tensor | None, runs: NativeRuns) -> None:
        """Add the runs' differences to the sub-layer's output, ``sublayer (N, hidden)``, to ``t`` in place. Streams that no run reads
        may be None.
        """
        if not t.is_contiguous():
            raise ValueError("the native kernel changes contiguous rows only")
        streams = [None if stream is None else self._rows(stream) for stream in (sublayer, residual, normed)]
        addresses = [None if stream is None else stream.data_ptr() for stream in streams]
        self._bottlenecks(self._rows(t, runs).data_ptr(), *addresses, *t.shape, *runs[:3])

    def norms(self, y: Tensor, x: Tensor, is_centered: bool, offset: float, eps: float, runs: NativeRuns) -> None:
        """Put the norms of the runs' rows of ``x (N, …, width)`` into those of ``y``, in place."""
        if not y.is_contiguous() or y.shape != x.shape:
            raise ValueError("the native kernel changes contiguous rows only")
        x, width = self._rows(x, runs), x.shape[-1]
        vectors = math.prod(x.shape[1:-1])
        self._norms(x.data_ptr(), self._rows(y).data_ptr(), x.shape[0], vectors, width, is_centered, offset, eps, *runs[:3])

    def _rows(self, rows: Tensor, runs: NativeRuns | None = None) -> Tensor:
        """Rows that may be read by their address, and written where the runs say. Raises ValueError when they may not."""
        if runs is not None and runs.end > rows.shape[0]:
            raise ValueError(f"runs end at row {runs.end} of {rows.shape[0]}")
        if rows.dtype != self._dtype or rows.device.type != "cpu":
            raise ValueError(f"the native kernel is for {self._dtype} on the CPU, not {rows.dtype} on {rows.device}")
        return rows.contiguous()


def _functions(library: Path, suffix: str) -> Iterator[Any]:
    loaded = load_library(library)
    for name, arguments in _ARGUMENTS.items():
        function = getattr(loaded, f"{name}_{suffix}")
        function.argtypes, function.restype = arguments, None
        yield function


def load_native(cache_dir: Path, dtype: torch.dtype, device: torch.device) -> NativeEdits | None:
    """The kernels for a dtype, built on first use; None where they cannot be had, which costs speed and nothing else."""
    if device.type != "cpu" or dtype not in _SUFFIXES:
        return None
    try:
        return NativeEdits(build_library(SOURCES, cache_dir, "edits"), dtype)
    except (OSError, AttributeError) as error:
        log.warning("the native kernels cannot be built or loaded, so the slower PyTorch ones run: %s", error)
        return None
