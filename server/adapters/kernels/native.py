"""The native CPU kernel: built once with the machine's compiler, kept on disk, and left out where there is none.

It reads every adapter weight exactly once and copies none, which is what bounds a decode step with many adapters.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from server.adapters.kernels.lowrank import LowRankRows, lowrank_gather

SOURCE = Path(__file__).with_name("lowrank.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")
_ENTRIES = {torch.float32: "lowrank_f32", torch.bfloat16: "lowrank_bf16"}

_ACTIVATIONS = {"linear": 0, "relu": 1, "gelu": 2, "gelu_new": 3, "gelu_pytorch_tanh": 3, "silu": 4, "swish": 4, "tanh": 5}
"""Codes of lowrank.cpp."""

log = logging.getLogger(__name__)


class NativeLowRank:
    """``lowrank_reference`` on contiguous CPU tensors of one dtype; activations that lowrank.cpp lacks take ``lowrank_gather``.

    Raises OSError when the library does not load.
    """

    def __init__(self, library: Path, dtype: torch.dtype) -> None:
        _share_openmp()
        self._function = getattr(ctypes.CDLL(str(library)), _ENTRIES[dtype])
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
    compiler = shutil.which("g++") or shutil.which("clang++")
    if device.type != "cpu" or dtype not in _ENTRIES:
        return None
    if compiler is None:
        log.warning("no C++ compiler found: adapters run on the slower PyTorch kernels (install g++ for the native one)")
        return None
    try:
        return NativeLowRank(_build(compiler, cache_dir), dtype)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        log.warning("the native kernel cannot be built or loaded, so the slower PyTorch kernels run: %s", error)
        return None


def _build(compiler: str, cache_dir: Path) -> Path:
    """Compile unless this source was compiled for this processor and compiler before."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout  # noqa: S603
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, _processor(), " ".join(_FLAGS).encode()])).hexdigest()[:16]
    library = cache_dir / f"lowrank-{key}.so"
    if library.exists():
        return library
    log.info("building the native kernel (once)")
    cache_dir.mkdir(parents=True, exist_ok=True)
    part = cache_dir / f".lowrank-{key}.{os.getpid()}"
    # Linked without -fopenmp: the OpenMP runtime must be PyTorch's, not a second one with threads of its own.
    for command in ([*_FLAGS, "-c", str(SOURCE), "-o", f"{part}.o"], ["-shared", f"{part}.o", "-o", f"{part}.so"]):
        subprocess.run([compiler, *command], capture_output=True, check=True, timeout=120)  # noqa: S603
    os.replace(f"{part}.so", library)
    Path(f"{part}.o").unlink()
    return library


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")


def _share_openmp() -> None:
    """Make the symbols of PyTorch's OpenMP runtime visible to the kernel."""
    for runtime in sorted((Path(torch.__file__).parent / "lib").glob("lib[gi]omp*.so*")):
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
