"""The native kernels of edits, built once for all tests of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.adapters.kernels import NativeEdits, load_native
from tests.kernels import KERNELS


@pytest.fixture(scope="session")
def kernel_dir() -> Path:
    return KERNELS


def native(kernel_dir: Path, dtype: torch.dtype) -> NativeEdits:
    """The kernels for a dtype."""
    kernel = load_native(kernel_dir, dtype, torch.device("cpu"))
    assert kernel is not None, "the machine that runs the tests has a C++ compiler"
    return kernel
