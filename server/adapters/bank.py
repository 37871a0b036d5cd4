"""Device storage of resident programs. Knows sizes and references; not what an edit means.

Two flat arenas with fixed addresses, ``rows`` (base dtype) and ``vectors`` (fp32), hold what all programs are mostly made of, at
their true size; the few other tensors are kept per program. A slot is the index of a resident program; slot 0 is the base, which
holds nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.base_spec import BaseSpec
from server.adapters.extents import Extents
from server.adapters.packed import PackedProgram, PrologueLayout, SiteLayout, TaskHeadLayout, alignment


@dataclass(frozen=True, slots=True)
class Resident:
    """A program in the bank. ``serial`` is never used twice, unlike ``slot``. ``kinds`` are its edits' beside those of linears: ``norm``,
    ``bottleneck``, …; what a step has none of costs it nothing."""

    program_id: str
    slot: int
    serial: int
    rows_offset: int
    vectors_offset: int
    layouts: dict[str, SiteLayout]
    extras: dict[str, Tensor]
    invocation_tokens: tuple[int, ...]
    prologue: PrologueLayout
    head: TaskHeadLayout | None
    num_rows: int
    num_vectors: int
    nbytes: int
    kinds: frozenset[str]


class Bank:
    """Admits, pins and evicts programs under one byte budget; the least recently used unpinned ones go first."""

    def __init__(self, spec: BaseSpec, *, capacity_bytes: int, max_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.capacity_bytes = capacity_bytes
        self.max_slots = max_slots
        self.unit = alignment(spec)
        vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        # Address space, not memory: pages are touched when a program is copied in. Scales are a small part of any program.
        self._row_extents = Extents(capacity_bytes // dtype.itemsize, self.unit)
        self._vector_extents = Extents(capacity_bytes // vector_dtype.itemsize, self.unit)
        self.rows = torch.empty(self._row_extents.capacity, dtype=dtype, device=device)
        self.vectors = torch.empty(self._vector_extents.capacity, dtype=vector_dtype, device=device)
        self._free_slots = list(range(max_slots, 0, -1))
        self._by_id: OrderedDict[str, Resident] = OrderedDict()
        self._by_slot: dict[int, Resident] = {}
        self._pins: dict[str, int] = {}
        self._serial = 0
        self.used_bytes = 0

    @property
    def num_slots_used(self) -> int:
        return len(self._by_id)

    @property
    def num_slots_pinned(self) -> int:
        return len(self._pins)

    def resident(self, slot: int) -> Resident:
        return self._by_slot[slot]

    def find(self, program_id: str) -> Resident | None:
        return self._by_id.get(program_id)

    def is_pinned(self, program_id: str) -> bool:
        return program_id in self._pins

    def fits(self, nbytes: int) -> bool:
        """Whether a program of this size could ever be admitted."""
        return nbytes + self.unit * (self.rows.itemsize + self.vectors.itemsize) <= self.capacity_bytes

    def admit(self, program: PackedProgram) -> tuple[Resident | None, list[str]]:
        """Copy a program in, evicting unpinned ones as needed. Returns it (None: no room now) and the evicted program ids."""
        if program.program_id in self._by_id:
            return self._by_id[program.program_id], []
        evicted: list[str] = []
        while (offsets := self._reserve(program)) is None:
            victim = next((name for name in self._by_id if name not in self._pins), None)
            if victim is None:
                return None, evicted
            self.evict(victim)
            evicted.append(victim)
        return self._install(program, *offsets), evicted

    def evict(self, program_id: str) -> None:
        """Free a program's slot and room. Raises ValueError while it is pinned."""
        if program_id in self._pins:
            raise ValueError(f"program {program_id} is in use by {self._pins[program_id]} sequences")
        resident = self._by_id.pop(program_id)
        del self._by_slot[resident.slot]
        self._free_slots.append(resident.slot)
        self._row_extents.release(resident.rows_offset, resident.num_rows)
        self._vector_extents.release(resident.vectors_offset, resident.num_vectors)
        self.used_bytes -= resident.nbytes

    def pin(self, program_id: str) -> int:
        """Take a reference for a sequence that runs, and return the slot."""
        self._pins[program_id] = self._pins.get(program_id, 0) + 1
        self._by_id.move_to_end(program_id)
        return self._by_id[program_id].slot

    def unpin(self, program_id: str) -> None:
        left = self._pins[program_id] - 1
        if left:
            self._pins[program_id] = left
        else:
            del self._pins[program_id]

    def row_view(self, width: int) -> Tensor | None:
        """The ``rows`` arena as ``(n, width)``, or None when programs are not aligned to this width."""
        return self.rows.view(-1, width) if self.unit % width == 0 else None

    def _reserve(self, program: PackedProgram) -> tuple[int, int] | None:
        if not self._free_slots or self.used_bytes + program.nbytes > self.capacity_bytes:
            return None
        rows = self._row_extents.allocate(program.rows.numel())
        if rows is None:
            return None
        vectors = self._vector_extents.allocate(program.vectors.numel())
        if vectors is None:
            self._row_extents.release(rows, program.rows.numel())
            return None
        return rows, vectors

    def _install(self, program: PackedProgram, rows: int, vectors: int) -> Resident:
        self.rows[rows : rows + program.rows.numel()].copy_(program.rows)
        self.vectors[vectors : vectors + program.vectors.numel()].copy_(program.vectors)
        self._serial += 1
        resident = Resident(
            program_id=program.program_id,
            slot=self._free_slots.pop(),
            serial=self._serial,
            rows_offset=rows,
            vectors_offset=vectors,
            layouts=program.layouts,
            extras={name: tensor.to(self.rows.device) for name, tensor in program.extras.items()},
            invocation_tokens=program.invocation_tokens,
            prologue=program.prologue,
            head=program.head,
            num_rows=program.rows.numel(),
            num_vectors=program.vectors.numel(),
            nbytes=program.nbytes,
            kinds=frozenset(kind for layout in program.layouts.values() for kind in layout.kinds),
        )
        self._by_id[program.program_id] = resident
        self._by_slot[resident.slot] = resident
        self.used_bytes += program.nbytes
        return resident
