"""The rows of one step for kernels by slot: which slots they are in, and what the programs in these have. Knows no bank and no base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from server.adapters.bank import Resident
from server.adapters.kernels.slots import SlotTerms
from server.adapters.linear import LooseWork
from server.adapters.norm_form import NormForm
from server.adapters.packed import BottleneckLayout
from server.adapters.slot_bottleneck import SlotGroup
from server.adapters.slot_linear import SlotLinearWork
from server.adapters.slot_norm import SlotNormWork
from server.adapters.slot_rows import SlotRows
from server.adapters.slot_table import IN_SCALE, LOW_RANK, PAIRS, VECTORS, SlotTable, Term, bottleneck_place


class SlotStep:
    """``terms`` of all programs together; ``rank`` and ``inner``: the powers of two that none of their linears' and bottlenecks' ranks is
    above. Steps in which these are the same launch the same kernels. ``is_whole``: nothing else acts on the rows, unless they are virtual
    tokens."""

    def __init__(
        self, table: SlotTable, runs: Sequence[tuple[Resident, int, int]], num_rows: int, slots: Tensor | None = None
    ) -> None:
        """``slots (num_rows,)`` int32 may be given, to be filled before each use."""
        facts = [table.facts(resident) for resident, _, _ in runs]
        self.table = table
        self.terms = frozenset[Term]().union(*(item.terms for item in facts))
        self.rank = _rounded(max((item.rank for item in facts), default=0))
        self.inner = _rounded(max((item.inner for item in facts), default=0))
        self.is_whole = all(item.is_whole for item in facts)
        self.slots = _slots(runs, num_rows, table.device) if slots is None else slots

    def linear(self, site: str, loose: LooseWork | None) -> SlotLinearWork | None:
        """The work at a linear site, with that of terms that have no place in the table; None when there is none."""
        found = {what for what in (LOW_RANK, VECTORS, IN_SCALE, PAIRS) if (site, what) in self.terms}
        if not found:
            return None if loose is None else SlotLinearWork(None, None, None, loose)
        rows = self.table.at(site, self.slots, SlotTerms(self.rank if LOW_RANK in found else 0, VECTORS in found))
        return SlotLinearWork(
            inputs=rows if IN_SCALE in found else None,
            pairs=rows if PAIRS in found else None,
            outputs=rows if found & {LOW_RANK, VECTORS} else None,
            loose=loose,
        )

    def norm(self, site: str, module: nn.Module, form: NormForm) -> SlotNormWork | None:
        """The work at a norm; None where norms go by runs of rows."""
        rows = self.table.at(site, self.slots, SlotTerms(0, False))
        if rows.kernels.norm is None:
            return None
        own = dict(module.named_parameters())
        return SlotNormWork(rows.kernels.norm, rows.slots, rows.places, form, own["weight"], own.get("bias"))

    def bottlenecks(self, site: str) -> list[SlotGroup]:
        """Those at a sub-layer's site that have a place in the table, kind by kind."""
        place, groups = bottleneck_place(site), []
        for kind in sorted(what for where, what in self.terms if where == place):
            activation, _, source = kind.partition(" of ")
            terms = SlotTerms(self.inner, True, self.table.kind(kind), activation)
            groups.append(SlotGroup(self.table.at(place, self.slots, terms), source))
        return groups

    def aside(self, members: Sequence[tuple[Resident, int, int, BottleneckLayout]]) -> SlotRows:
        """Bottlenecks of one activation that have no place in the table: (program, first row, end, layout)."""
        return self.table.aside(members, self.slots.shape[0])


def _rounded(rank: int) -> int:
    """The power of two that a rank is not above; 0 for 0."""
    return 1 << (rank - 1).bit_length() if rank else 0


def _slots(runs: Sequence[tuple[Resident, int, int]], num_rows: int, device: torch.device) -> Tensor:
    slots = [0] * num_rows
    for resident, start, end in runs:
        slots[start:end] = [resident.slot] * (end - start)
    return torch.tensor(slots, dtype=torch.int32, device=device)
