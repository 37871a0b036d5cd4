"""What form a norm module has, found out by trying it: what kernels must know of one to do its maths with other parameters."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

_PROBE = 1e-3
"""Small enough to tell by the result which epsilon a norm adds."""


class NormForm(NamedTuple):
    """``y = (x - mean) / sqrt(var + eps) * (weight + offset) + bias``; not ``is_centered``: without the mean."""

    is_centered: bool
    offset: float
    eps: float


def norm_form(module: nn.Module) -> NormForm | None:
    """The form of a norm module; None when it is one that the kernel does not have."""
    if isinstance(module, nn.LayerNorm):
        return NormForm(is_centered=True, offset=0.0, eps=module.eps)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = module.weight
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or set(dict(module.named_parameters())) != {"weight"}:
        return None
    x = torch.full((1, weight.shape[0]), _PROBE, dtype=weight.dtype, device=weight.device)
    tried = [torch.func.functional_call(module, {"weight": torch.full_like(weight, value)}, (x,)).float() for value in (0.0, 1.0)]
    normed = _PROBE / math.sqrt(_PROBE**2 + eps)
    for offset in (0.0, 1.0):
        if all(
            torch.allclose(found / normed, torch.full_like(found, value + offset), atol=0.02) for value, found in enumerate(tried)
        ):
            return NormForm(is_centered=False, offset=offset, eps=eps)
    return None
