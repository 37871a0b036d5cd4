"""Replaced norm parameters for the native kernel: one call for all rows of a step that have any.

Knows the layout that ``kernels/norm.cpp`` reads; ``norm`` does the same with the module's own code.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from server.adapters.kernels import NativeEdits, NativeRuns, join_runs
from server.adapters.norm import NormRun
from server.adapters.norm_form import NormForm

_RECORD = struct.Struct("2q")


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
