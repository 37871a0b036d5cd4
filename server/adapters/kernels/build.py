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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

_HEADERS = Path(__file__).parent
"""Where headers lie that all sources share."""
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp")

log = logging.getLogger(__name__)


def build_library(sources: Sequence[Path], cache_dir: Path, name: str) -> Path:
    """The shared library of these sources, compiled unless they, the headers beside them or here, the compiler and the processor are those of before.

    Raises OSError where it cannot be built, with what the compiler said.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found (install g++ 12 or later)")
    version = _run([compiler, "--version"])
    headers = sorted({header for place in {_HEADERS, *(source.parent for source in sources)} for header in place.glob("*.h")})
    texts = [path.read_bytes() for path in (*sources, *headers)]
    key = hashlib.sha256(b"\0".join([*texts, version, _processor(), " ".join(_FLAGS).encode()])).hexdigest()[:16]
    library = cache_dir / f"{name}-{key}.so"
    if library.exists():
        return library
    log.info("building the native kernel %s (once)", name)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as scratch:
        with ThreadPoolExecutor() as pool:
            compile_one = partial(_compile, compiler, Path(scratch))
            objects = list(pool.map(compile_one, sources))
        # Linked without -fopenmp: the OpenMP runtime must be PyTorch's, not a second one with threads of its own.
        _run([compiler, "-shared", *objects, "-o", library.name], Path(scratch))
        made = Path(scratch) / library.name
        with made.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(made, library)
    return library


def _compile(compiler: str, scratch: Path, source: Path) -> str:
    """The name of a source's object file in the scratch directory."""
    _run([compiler, *_FLAGS, f"-I{_HEADERS.resolve()}", "-c", str(source.resolve())], scratch)
    return f"{source.stem}.o"


def _run(command: list[str], directory: Path | None = None) -> bytes:
    try:
        return subprocess.run(command, cwd=directory, capture_output=True, check=True, timeout=300).stdout  # noqa: S603
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(f"{command[0]} failed: {said[0] if said else error} (g++ 12 or later is needed)") from error
    except subprocess.TimeoutExpired as error:
        raise OSError(str(error)) from error


def load_library(path: Path) -> ctypes.CDLL:
    """A built library, on PyTorch's OpenMP runtime. Raises OSError when it does not load; it is then built anew the next time."""
    for runtime in sorted((Path(torch.__file__).parent / "lib").glob("lib[gi]omp*.so*")):
        ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return b""
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")
