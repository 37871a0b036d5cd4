"""Device storage of resident programs. Knows sizes and references; not what an edit means.

Two flat arenas with fixed addresses, ``rows`` (base dtype) and ``vectors`` (fp32), hold what all programs are mostly made of, at
their true size; the few other tensors are kept per program. A slot is the index of a resident program; slot 0 is the base, which
holds nothing.

What goes when room is needed is ``eviction``'s business. Room that lies in pieces is not evicted for but pushed together: programs slide
down into gaps, between two steps, also those in use. Since the budget counts what programs take in the arenas, rounding included, room by
the budget is room in one piece afterwards.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from server.adapters.base_spec import BaseSpec
from server.adapters.eviction import Eviction
from server.adapters.extents import Extents, Slide
from server.adapters.packed import PackedProgram, PrologueLayout, SiteLayout, TaskHeadLayout, alignment


@dataclass(frozen=True, slots=True)
class Resident:
    """A program in the bank, at this place, where it takes ``nbytes``. ``serial`` is never used twice, unlike ``slot``: one that moved has a
    new one. ``kinds`` are its edits' beside those of linears: ``norm``, ``bottleneck``, …; what a step has none of costs it nothing."""

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


_VECTOR_UNIT = 16
"""Vectors are never read as rows: what they need is a place that copies well."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What became of an attempt. ``resident`` None: not now. ``evicted`` programs went for it, ``is_moving``: its room is being made."""

    resident: Resident | None = None
    evicted: tuple[str, ...] = ()
    is_moving: bool = False


@dataclass(slots=True)
class _Claim:
    """A program that has waited for too long. ``draining`` programs get no new references; ``shares`` is whether shares hold for it."""

    program_id: str
    tenant: str | None
    shares: bool
    draining: set[str]


class Bank:
    """Admits, pins and evicts programs under one byte budget and a number of slots. ``copied_bytes`` only grows, with copies and moves."""

    def __init__(
        self,
        spec: BaseSpec,
        *,
        capacity_bytes: int,
        max_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.max_slots = max_slots
        self.unit = alignment(spec)
        vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        # Address space, not memory: pages are touched when a program is copied in. Scales are a small part of any program.
        self._row_extents = Extents(capacity_bytes // dtype.itemsize, self.unit)
        self._vector_extents = Extents(capacity_bytes // vector_dtype.itemsize, _VECTOR_UNIT)
        self.rows = torch.empty(self._row_extents.capacity, dtype=dtype, device=device)
        self.vectors = torch.empty(self._vector_extents.capacity, dtype=vector_dtype, device=device)
        self._free_slots = list(range(max_slots, 0, -1))
        self._by_id: dict[str, Resident] = {}
        self._by_slot: dict[int, Resident] = {}
        self._references: dict[str, int] = {}
        self._policy = Eviction(capacity_bytes, max_slots, clock=clock)
        self._claim: _Claim | None = None
        self._watchers: list[Callable[[int], None]] = []
        self._serial = 0
        self.used_bytes = 0
        self.copied_bytes = 0

    @property
    def num_slots_used(self) -> int:
        return len(self._by_id)

    @property
    def num_slots_pinned(self) -> int:
        """Programs that cannot go now: in use, or kept by an explicit pin."""
        return len(self._references.keys() | (self._policy.permanent & self._by_id.keys()))

    @property
    def permanent_bytes(self) -> int:
        """What explicitly pinned programs take."""
        return self._policy.permanent_bytes

    def resident(self, slot: int) -> Resident:
        return self._by_slot[slot]

    def find(self, program_id: str) -> Resident | None:
        return self._by_id.get(program_id)

    def is_pinned(self, program_id: str) -> bool:
        """Whether sequences that run use the program."""
        return program_id in self._references

    def footprint(self, program: PackedProgram) -> int:
        """The bytes that a program takes in the bank."""
        rows = self._row_extents.rounded(program.rows.numel()) * self.rows.itemsize
        vectors = self._vector_extents.rounded(program.vectors.numel()) * self.vectors.itemsize
        return rows + vectors + sum(tensor.nbytes for tensor in program.extras.values())

    def room_beside_pins(self, program_id: str) -> int:
        """The bytes that a program can have at most: what other explicitly pinned programs leave."""
        own = self._by_id[program_id].nbytes if program_id in self._policy.permanent & self._by_id.keys() else 0
        return self.capacity_bytes - self.permanent_bytes + own

    def keep(self, program_id: str) -> None:
        """Pin explicitly: once admitted, the program stays until ``let_go``."""
        self._policy.permanent.add(program_id)

    def let_go(self, program_id: str) -> None:
        self._policy.permanent.discard(program_id)

    def watch(self, watcher: Callable[[int], None]) -> None:
        """Call ``watcher(serial)`` whenever what a serial stood for has gone or moved."""
        self._watchers.append(watcher)

    def admit(
        self, program: PackedProgram, tenant: str | None = None, *, insists: bool = False, move_bytes: int = sys.maxsize
    ) -> Admission:
        """Copy a program in for a tenant (None: nobody), evicting others as the policy says, and moving some when room lies in pieces.

        One that ``insists`` has waited for long: programs are drained for it, which get no new references until it has come. They are
        taken from those that are nobody's guaranteed share; where even these are not enough, from all. Meanwhile only tenants that stay
        within their shares are admitted beside it. At most about ``move_bytes`` are moved; the next attempt goes on.
        """
        if program.program_id in self._by_id:
            return Admission(self._by_id[program.program_id])
        footprint = self.footprint(program)
        if self._must_wait(program.program_id, tenant, footprint):
            return Admission()
        nbytes, count = self.used_bytes + footprint - self.capacity_bytes, 1 - len(self._free_slots)
        claim = self._claim if self._claim is not None and self._claim.program_id == program.program_id else None
        shares = claim is None or claim.shares
        victims = self._policy.choose(tenant, nbytes, count, held=self._references, shares=shares)
        if victims is None:
            if insists or claim is not None:
                self._drain(program.program_id, tenant, nbytes, count)
            return Admission()
        for victim in victims:
            self._policy.evict(victim)
            self._free(victim)
        offsets = self._reserve(program, move_bytes)
        if offsets is None:
            return Admission(None, tuple(victims), is_moving=True)
        self.withdraw(program.program_id)
        return Admission(self._install(program, *offsets), tuple(victims))

    def withdraw(self, program_id: str) -> None:
        """The program has come, or nobody wants it any more: nothing is drained for it."""
        if self._claim is not None and self._claim.program_id == program_id:
            self._claim = None

    def evict(self, program_id: str) -> None:
        """Free a program's slot and room. Raises ValueError while sequences use it."""
        if program_id in self._references:
            raise ValueError(f"program {program_id} is in use by {self._references[program_id]} sequences")
        self._policy.remove(program_id)
        self._free(program_id)

    def can_pin(self, program_id: str) -> bool:
        """Whether a resident program takes new references: not while it is drained for another."""
        return self._claim is None or program_id not in self._claim.draining

    def pin(self, program_id: str, tenant: str = "") -> int:
        """Take a reference for a tenant's sequence that runs, and return the slot."""
        self._references[program_id] = self._references.get(program_id, 0) + 1
        self._policy.use(program_id, tenant)
        return self._by_id[program_id].slot

    def unpin(self, program_id: str, tenant: str = "") -> None:
        self._policy.touch(program_id, tenant)
        left = self._references[program_id] - 1
        if left:
            self._references[program_id] = left
        else:
            del self._references[program_id]

    def row_view(self, width: int) -> Tensor | None:
        """The ``rows`` arena as ``(n, width)``, or None when programs are not aligned to this width."""
        return self.rows.view(-1, width) if self.unit % width == 0 else None

    def _must_wait(self, program_id: str, tenant: str | None, footprint: int) -> bool:
        """Whether another program's claim goes first."""
        if self._claim is None or self._claim.program_id == program_id:
            return False
        return tenant is None or tenant == self._claim.tenant or not self._policy.is_within_share(tenant, footprint)

    def _drain(self, program_id: str, tenant: str | None, nbytes: int, count: int) -> None:
        if self._claim is None:
            self._claim = _Claim(program_id, tenant, shares=True, draining=set())
        found = self._policy.choose(tenant, nbytes, count)
        if found is None:
            self._claim.shares = False
            found = self._policy.choose(tenant, nbytes, count, shares=False) or []
        self._claim.draining.update(found)

    def _free(self, program_id: str) -> None:
        resident = self._by_id.pop(program_id)
        del self._by_slot[resident.slot]
        self._free_slots.append(resident.slot)
        self._row_extents.release(resident.rows_offset, resident.num_rows)
        self._vector_extents.release(resident.vectors_offset, resident.num_vectors)
        self.used_bytes -= resident.nbytes
        self._tell(resident.serial)

    def _tell(self, serial: int) -> None:
        for watcher in self._watchers:
            watcher(serial)

    def _reserve(self, program: PackedProgram, move_bytes: int) -> tuple[int, int] | None:
        """Room in both arenas, pushed together where it lies in pieces; None: there is more to move than is allowed now."""
        most = self.copied_bytes + move_bytes
        while (rows := self._row_extents.allocate(program.rows.numel())) is None:
            if self.copied_bytes >= most:
                return None
            self._move_rows()
        while (vectors := self._vector_extents.allocate(program.vectors.numel())) is None:
            if self.copied_bytes >= most:
                self._row_extents.release(rows, program.rows.numel())
                return None
            self._move_vectors()
        return rows, vectors

    def _move_rows(self) -> None:
        slide = self._row_extents.slide()
        assert slide is not None, "room by the budget is room in the arena"
        moved = next(item for item in self._by_id.values() if item.num_rows and item.rows_offset == slide.start)
        _copy_down(self.rows, slide)
        self.copied_bytes += slide.length * self.rows.itemsize
        self._replace(moved, replace(moved, rows_offset=slide.to, serial=self._next_serial()))

    def _move_vectors(self) -> None:
        slide = self._vector_extents.slide()
        assert slide is not None, "room by the budget is room in the arena"
        moved = next(item for item in self._by_id.values() if item.num_vectors and item.vectors_offset == slide.start)
        _copy_down(self.vectors, slide)
        self.copied_bytes += slide.length * self.vectors.itemsize
        self._replace(moved, replace(moved, vectors_offset=slide.to, serial=self._next_serial()))

    def _replace(self, resident: Resident, moved: Resident) -> None:
        self._by_id[moved.program_id] = self._by_slot[moved.slot] = moved
        self._tell(resident.serial)

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def _install(self, program: PackedProgram, rows: int, vectors: int) -> Resident:
        # From pinned memory these copies run beside the host; they are in order with the step that reads them.
        self.rows[rows : rows + program.rows.numel()].copy_(program.rows, non_blocking=True)
        self.vectors[vectors : vectors + program.vectors.numel()].copy_(program.vectors, non_blocking=True)
        device = self.rows.device
        resident = Resident(
            program_id=program.program_id,
            slot=self._free_slots.pop(),
            serial=self._next_serial(),
            rows_offset=rows,
            vectors_offset=vectors,
            layouts=program.layouts,
            # Copies on the CPU, too: a view would keep the whole of the host's copy.
            extras={name: tensor.to(device, non_blocking=True, copy=True) for name, tensor in program.extras.items()},
            invocation_tokens=program.invocation_tokens,
            prologue=program.prologue,
            head=program.head,
            num_rows=program.rows.numel(),
            num_vectors=program.vectors.numel(),
            nbytes=self.footprint(program),
            kinds=frozenset(kind for layout in program.layouts.values() for kind in layout.kinds),
        )
        self._by_id[program.program_id] = self._by_slot[resident.slot] = resident
        self._policy.add(program.program_id, resident.nbytes)
        self.used_bytes += resident.nbytes
        self.copied_bytes += resident.nbytes
        return resident


def _copy_down(arena: Tensor, slide: Slide) -> None:
    """By way of a copy: the two ranges may overlap."""
    arena[slide.to : slide.to + slide.length] = arena[slide.start : slide.start + slide.length].clone()
