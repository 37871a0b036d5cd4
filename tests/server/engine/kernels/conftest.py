"""The base's native kernels, built once for all tests of this directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.engine.kernels import Native, load_native
from tests.kernels import KERNELS

Load = Callable[[torch.dtype], Native]


@pytest.fixture(scope="session")
def kernel_dir() -> Path:
    return KERNELS


@pytest.fixture(scope="session")
def native(kernel_dir: Path) -> Load:
    """dtype → the kernels."""

    def load(dtype: torch.dtype) -> Native:
        found = load_native(kernel_dir, dtype, torch.device("cpu"))
        assert found is not None, "the machine that runs the tests has a C++ compiler"
        return found

    return load
