"""Where the Triton kernels run, and which they are. They come with PyTorch on GPU machines; nothing else imports them."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from functools import cache

import torch

from server.adapters.kernels.slots import SlotKernels

_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})

log = logging.getLogger(__name__)


def runs_triton(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether tensors of a dtype on a device have Triton kernels. Where triton is missing, that costs speed and nothing else."""
    return device.type == "cuda" and dtype in _DTYPES and _is_installed()


def load_triton(dtype: torch.dtype, device: torch.device) -> SlotKernels | None:
    """The kernels of edits for a dtype; None where PyTorch's operations do the work."""
    if not runs_triton(dtype, device):
        return None
    return importlib.import_module("server.adapters.kernels.triton_slots").TRITON  # type: ignore[no-any-return]


@cache
def _is_installed() -> bool:
    if importlib.util.find_spec("triton") is not None:
        return True
    log.warning("triton is not installed, so the slower PyTorch kernels run on the GPU")
    return False
