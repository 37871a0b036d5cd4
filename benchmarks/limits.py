"""What the machine can do at most, measured now: memory reads, float32 FMAs, and PyTorch's own matrix products in the base's precision."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("limits.cpp")


@dataclass(frozen=True, slots=True)
class Limits:
    """``read`` in bytes a second; ``fma`` (float32) and ``matmul`` (by its number of rows, in the base's precision) in operations a second.

    ``fma`` is 0 where there is no compiler to measure it with.
    """

    read: float
    fma: float
    matmul: dict[int, float]

    @property
    def compute(self) -> float:
        """The most operations a second that anything reached here."""
        return max(self.fma, *self.matmul.values())

    def seconds(self, nbytes: float, operations: float) -> float:
        """The least that reading so many bytes and computing so many operations takes, each hidden behind the other."""
        return max(nbytes / self.read, operations / self.compute)


def measure_limits(dtype: torch.dtype, rows: tuple[int, ...] = (1, 8, 32, 512)) -> Limits:
    """The limits of this machine with PyTorch's number of threads."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    read, fma = _native(compiler) if compiler else (_torch_read(), 0.0)
    return Limits(read, fma, {count: _matmul(count, dtype) for count in rows})


def _native(compiler: str) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as scratch:
        program = str(Path(scratch) / "limits")
        subprocess.run([compiler, "-O3", "-march=native", "-std=c++17", "-fopenmp", str(SOURCE), "-o", program], check=True)
        read, fma = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    return float(read), float(fma)


def _torch_read() -> float:
    data = torch.ones(1 << 27)
    return data.nbytes / _best(lambda: data.sum(), 8)


def _matmul(rows: int, dtype: torch.dtype) -> float:
    """Operations a second of ``(rows, 576) @ (576, 1536)``, a linear of SmolLM2, over weights that no cache holds."""
    weights = [torch.randn(1536, 576, dtype=dtype) for _ in range(64)]
    x = torch.randn(rows, 576, dtype=dtype)
    seconds = _best(lambda: [torch.nn.functional.linear(x, weight) for weight in weights], 5)
    return 2 * rows * 576 * 1536 * len(weights) / seconds


def _best(function: object, repeats: int) -> float:
    assert callable(function)
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        found.append(time.perf_counter() - started)
    return min(found)
