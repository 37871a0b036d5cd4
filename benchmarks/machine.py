"""What a benchmark's figures were measured on, and how busy others kept the machine meanwhile."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

OUT = Path(__file__).parent / "out"
"""Where benchmarks leave their results."""
_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
"""Processor flags that decide which kernels there are."""


def describe(dtype: str) -> dict[str, Any]:
    """The machine, the software and the hour, as JSON has them."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "processor": _cpuinfo("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in (_cpuinfo("flags") or "").split()],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "dtype": dtype,
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


@dataclass(slots=True)
class Watch:
    """``others``: what part of the machine processes outside this one's tree took."""

    others: float = 0.0


@contextmanager
def watched() -> Iterator[Watch]:
    """Watch the machine while the context is open."""
    watch, started = Watch(), time.monotonic()
    machine, own = _busy(), _own()
    yield watch
    available = (time.monotonic() - started) * (os.cpu_count() or 1)
    watch.others = max(0.0, min(1.0, ((_busy() - machine) - (_own() - own)) / max(available, 1e-9)))


def _busy() -> float:
    """Seconds that all processors together have been busy since boot."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


def _own() -> float:
    """Processor seconds of this process and everything that it has started, ended children included."""
    total, this = 0.0, psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


def _cpuinfo(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _commit() -> str:
    try:
        found = subprocess.run(
            [shutil.which("git") or "git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found.stdout.strip()
