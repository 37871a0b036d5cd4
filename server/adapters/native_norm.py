"""Replaced norm parameters for the native kernel: one call for all rows of a step that have any.

Knows the layout that ``kernels/norm.cpp`` reads, and finds out what form a norm module has by trying it; ``norm`` does the same
with the module's own code.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from server.adapters.kernels import NativeEdits, NativeRuns, join_runs
from server.adapters.norm import NormRun

_RECORD = struct.Struct("2q")
_PROBE = 1e-3
"""Small enough to tell by the result which epsilon a norm adds."""


class NormForm(NamedTuple):
    """``y = (x - mean) / sqrt(var + eps) * (weight + offset) + bias``; not ``is_centered``: without the mean."""

    is_centered: bool
    offset: float
    eps: float


@dataclass(frozen=True, slots=True)
class NativeNormWork:
    """The rows of a step with parameters of their own at one norm."""

    kernel: NativeEdits
    form: NormForm
    runs: NativeRuns
    kept: tuple[Tensor, ...]
    """What the runs' addresses point to."""

    def put(self, y: Tensor, x: Tensor) -> None:
        """Put the norms of those rows of ``x (T, …, width)`` into ``y``, which has the same shape, in place."""
        self.kernel.norms(y, x, *self.form, self.runs)


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


def native_norm_work(kernel: NativeEdits, form: NormForm, module: nn.Module, runs: Sequence[NormRun]) -> NativeNormWork:
    """The work of runs with norm parameters, which need not replace all that the norm has.

    Raises ValueError for a tensor that does not fit the norm.
    """
    own = dict(module.named_parameters())
    kept: list[Tensor] = []
    records = []
    for start, end, found in runs:
        parameters = [found.get(name, own.get(name)) for name in ("weight", "bias")]
        for tensor in parameters:
            if tensor is not None and (
                tensor.shape != own["weight"].shape or tensor.dtype != own["weight"].dtype or not tensor.is_contiguous()
            ):
                raise ValueError(f"a norm's parameter is {tensor.dtype} of shape {tuple(tensor.shape)}")
        kept += [tensor for tensor in parameters if tensor is not None]
        records.append((start, end, _RECORD.pack(*(0 if tensor is None else tensor.data_ptr() for tensor in parameters))))
    joined = join_runs(records)
    assert joined is not None, "norm work has runs"
    return NativeNormWork(kernel, form, joined, tuple(kept))
