"""The native kernels of edits, built once for all tests of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.adapters.base_spec import BaseSpec, SiteSpec, Sublayer
from server.adapters.kernels import NativeEdits, load_native
from tests.kernels import KERNELS


@pytest.fixture(scope="session")
def kernel_dir() -> Path:
    return KERNELS


def small_spec(hidden_size: int, *sites: SiteSpec, dtype: str = "float32") -> BaseSpec:
    """A base of one layer that has these sites and nothing to run."""
    return BaseSpec(
        family="llama",
        digest="",
        dtype=dtype,
        hidden_size=hidden_size,
        vocab_size=11,
        num_layers=1,
        backbone_prefix="model.",
        tied_head=False,
        embedding="e",
        head="h",
        sites=sites,
        sublayers=tuple(Sublayer(0, "mlp", site.name, "other", post_norm=False) for site in sites if site.kind == "linear"),
    )


def native(kernel_dir: Path, dtype: torch.dtype) -> NativeEdits:
    """The kernels for a dtype."""
    kernel = load_native(kernel_dir, dtype, torch.device("cpu"))
    assert kernel is not None, "the machine that runs the tests has a C++ compiler"
    return kernel
