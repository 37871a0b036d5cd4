"""The Triton kernels compile for a GPU, and what chooses kernels needs no triton."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(*arguments: str, cache: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_kernel_compiles_for_an_h100(tmp_path: Path) -> None:
    names = [line.split()[0] for line in run("-m", "tests.compile_triton", cache=tmp_path).splitlines()]
    assert set(names) == {"_shrink", "_expand", "_scale", "_pairs", "_norm", "_attend", "_join"}


def test_the_choice_of_kernels_needs_no_triton(tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None; import server.adapters.rows, server.engine.kernels.choice"
    run("-c", code, cache=tmp_path)
