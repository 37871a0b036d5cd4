"""Building native kernels with the machine's own compiler, once. Knows sources and a cache directory, not what they compute."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")

log = logging.getLogger(__name__)


def build_library(sources: Sequence[Path], cache_dir: Path, name: str) -> Path:
    """The shared library of these sources, compiled unless they, the headers beside them, the compiler and the processor are those of before.

    Raises OSError or subprocess.SubprocessError where it cannot be built.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found (install g++)")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=30).stdout  # noqa: S603
    headers = sorted({header for source in sources for header in source.parent.glob("*.h")})
    texts = [path.read_bytes() for path in (*sources, *headers)]
    key = hashlib.sha256(b"\0".join([*texts, version, _processor(), " ".join(_FLAGS).encode()])).hexdigest()[:16]
    library = cache_dir / f"{name}-{key}.so"
    if library.exists():
        return library
    log.info("building the native kernel %s (once)", name)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        objects = [f"{source.stem}.o" for source in sources]
        # Linked without -fopenmp: the OpenMP runtime must be PyTorch's, not a second one with threads of its own.
        for command in (
            [*_FLAGS, "-c", *(str(source.resolve()) for source in sources)],
            ["-shared", *objects, "-o", library.name],
        ):
            subprocess.run([compiler, *command], cwd=scratch, capture_output=True, check=True, timeout=300)  # noqa: S603
        os.replace(Path(scratch) / library.name, library)
    return library


def load_library(path: Path) -> ctypes.CDLL:
    """A built library, on PyTorch's OpenMP runtime. Raises OSError when it does not load."""
    for runtime in sorted((Path(torch.__file__).parent / "lib").glob("lib[gi]omp*.so*")):
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
