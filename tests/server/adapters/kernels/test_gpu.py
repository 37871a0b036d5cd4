"""Which devices and dtypes run the Triton kernels, and that they are the ones that run there."""

from __future__ import annotations

import importlib.util
import logging

import pytest
import torch

from server.adapters.kernels import gpu, load_triton
from server.adapters.kernels.triton_slots import TRITON

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _look_again() -> None:
    gpu._is_installed.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_runs_triton(dtype: torch.dtype) -> None:
    assert load_triton(dtype, GPU) is TRITON


@pytest.mark.parametrize(("dtype", "device"), [(torch.float32, CPU), (torch.float64, GPU)])
def test_elsewhere_pytorch_does_the_work(dtype: torch.dtype, device: torch.device) -> None:
    assert load_triton(dtype, device) is None


def test_without_triton_the_log_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert load_triton(torch.bfloat16, GPU) is None
        assert not gpu.runs_triton(torch.float16, GPU)
    assert [record.message for record in caplog.records] == [
        "triton is not installed, so the slower PyTorch kernels run on the GPU"
    ]
    gpu._is_installed.cache_clear()
