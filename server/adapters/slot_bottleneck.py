"""The bottlenecks of a step at one sub-layer's output, by slot: on a GPU. The meaning is ``ir.BottleneckEdit``'s, and ``bottleneck.Group`` does
the same in PyTorch, also with what has no place in the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from server.adapters.slot_rows import SlotRows
from server.adapters.streams import Streams


@dataclass(frozen=True, slots=True)
class SlotGroup:
    """Bottlenecks of one kind, at most one a row, which read the stream ``source``."""

    rows: SlotRows
    source: str

    def run(self, streams: Streams, vectors: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """Change the rows of ``t``; ``vectors`` are known already. None of them replaces what the base does after the sub-layer."""
        self.rows.add(t, streams.get(self.source))
        return ()
