"""What a step's programs do at a linear, by slot: on a GPU. ``linear.SiteWork`` does the same in PyTorch; the meaning is ``ir.LinearEdit``'s."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.adapters.linear import LooseWork
from server.adapters.slot_rows import SlotRows


@dataclass(frozen=True, slots=True)
class SlotLinearWork:
    """A LinearWork. ``inputs``, ``pairs`` and ``outputs`` None where no program has such terms; ``loose``: those that have no place in the
    table."""

    inputs: SlotRows | None
    pairs: SlotRows | None
    outputs: SlotRows | None
    loose: LooseWork | None

    def before(self, x: Tensor) -> Tensor:
        """What the base reads in place of ``x (N, in)``."""
        scaled = x if self.inputs is None else self.inputs.scale(x)
        return scaled if self.loose is None else self.loose.rotated(scaled)

    def after(self, z: Tensor, x: Tensor) -> Tensor:
        """The result ``(N, out)`` from the base's output ``z``, which may be changed, and what came in."""
        y = z if self.pairs is None else z.clone()
        if self.outputs is not None:
            self.outputs.add(y, x)
        if self.pairs is not None:
            self.pairs.add_pairs(y, z)
        if self.loose is not None:
            self.loose.add_products(y, x)
        return y
