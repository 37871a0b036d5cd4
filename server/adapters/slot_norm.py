"""Replaced norm parameters, by slot: on a GPU. ``norm.ModuleNormWork`` does the same with the norm's own code."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.adapters.kernels.slots import SlotNorm
from server.adapters.norm_form import NormForm


@dataclass(frozen=True, slots=True)
class SlotNormWork:
    """A NormWork. ``weight`` and ``bias`` are the norm's own; ``kernels.slots`` says what the other tensors are."""

    kernel: SlotNorm
    slots: Tensor
    places: Tensor
    form: NormForm
    weight: Tensor
    bias: Tensor | None

    def put(self, y: Tensor, x: Tensor) -> None:
        """Put the norms of the rows of ``x (T, …, width)`` that have parameters of their own into ``y``, in place."""
        self.kernel(y, x.contiguous(), self.slots, self.places, self.weight, self.bias, self.form)
