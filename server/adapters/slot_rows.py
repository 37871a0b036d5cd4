"""The rows of a step at one place of a table: what kernels by slot are called with. Knows tensors, not which programs they are of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.adapters.kernels import SlotKernels
from server.adapters.kernels.slots import SlotTerms


@dataclass(frozen=True, slots=True)
class SlotRows:
    """``kernels.slots`` says what the tensors are. ``rows`` and ``vectors`` are the bank's arenas."""

    kernels: SlotKernels
    rows: Tensor
    vectors: Tensor
    slots: Tensor
    places: Tensor
    terms: SlotTerms

    def scale(self, x: Tensor) -> Tensor:
        """``in_scale * x``, a new tensor."""
        return self.kernels.scale(x, self.vectors, self.slots, self.places)

    def add(self, y: Tensor, x: Tensor) -> None:
        """``y = out_scale * y + act(x @ down.T + bias) @ up + shift`` in place."""
        self.kernels.add(y, x, self.rows, self.vectors, self.slots, self.places, self.terms)

    def add_pairs(self, y: Tensor, z: Tensor) -> None:
        """``y += pair_scale * swap(z)`` in place; ``z`` is another tensor."""
        self.kernels.pairs(y, z, self.vectors, self.slots, self.places)
