"""Device storage of resident programs. Knows sizes and references; not what an edit means.

One arena with a fixed address, read as ``rows`` (base dtype) and as ``vectors`` (fp32), holds what all programs are mostly made of, at
their true size (two numbers of a program in bf16 take one element of fp32 rows); the few other tensors are kept per program. A slot
is the index of a resident program; slot 0 is the base, which holds nothing.

What goes when room is needed is ``eviction``'s business. Room that lies in pieces is not evicted for but pushed together: programs slide
down into gaps, between two steps, also those in use. Since the budget counts what programs take in the arena, rounding included, room by
the budget is room in one piece afterwards.

On a GPU programs are copied beside the steps. One whose copy is under way is resident, but cannot be pinned; nobody else waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from server.adapters.arena import Arena
from server.adapters.base_spec import BaseSpec
from server.adapters.claim import Claim
from server.adapters.copy_budget import CopyBudget
from server.adapters.eviction import Eviction
from server.adapters.extents import Slide
from server.adapters.packed import PackedProgram, PrologueLayout, SiteLayout, TaskHeadLayout, alignment
from server.adapters.pending_copies import CopyStream, PendingCopies


@dataclass(frozen=True, slots=True)
class Resident:
    """A program in the bank, which takes ``nbytes``: ``length`` of the arena from byte ``start`` on, and ``extras``. Offsets are elements of
    ``rows`` and ``vectors``. ``serial`` is never used twice, unlike ``slot``: one that moved has a new one. ``num_rows`` are elements of
    ``rows``, whose dtype need not be that of its matrices, ``rows_dtype``. ``kinds`` are its edits' beside those of linears: ``norm``,
    ``bottleneck``, …; what a step has none of costs it nothing."""

    program_id: str
    slot: int
    serial: int
    start: int
    length: int
    rows_offset: int
    vectors_offset: int
    layouts: dict[str, SiteLayout]
    extras: dict[str, Tensor]
    invocation_tokens: tuple[int, ...]
    prologue: PrologueLayout
    head: TaskHeadLayout | None
    num_rows: int
    num_vectors: int
    rows_dtype: torch.dtype
    nbytes: int
    kinds: frozenset[str]


COMPUTE_ERRORS = (RuntimeError, MemoryError, ValueError, TypeError, IndexError)
"""What tensor operations raise, memory that runs out included."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What became of an attempt. ``resident`` None: not now. ``evicted`` programs went for it. ``is_deferred``: the step's copies are spent, and
    the next one gets on with it. ``error``: the device could not do it; nothing of it is left."""

    resident: Resident | None = None
    evicted: tuple[str, ...] = ()
    is_deferred: bool = False
    error: Exception | None = None


class Bank:
    """Admits, pins and evicts programs under one byte budget and a number of slots. ``copies`` bounds what a step copies and moves.
    ``keeps_bf16``: matrices that were packed in bf16 stay so, for kernels that read them beside the base's dtype; otherwise all become that.
    ``copy_stream``: where programs are copied, on a device that copies beside its steps.
    """

    def __init__(
        self,
        spec: BaseSpec,
        *,
        capacity_bytes: int,
        max_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        keeps_bf16: bool = False,
        copy_stream: CopyStream | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.spec = spec
        self.capacity_bytes = capacity_bytes
        self.max_slots = max_slots
        self._arena = Arena(capacity_bytes, alignment(spec), dtype=dtype, device=device, keeps_bf16=keeps_bf16)
        self.rows, self.vectors = self._arena.rows, self._arena.vectors
        self._free_slots = list(range(max_slots, 0, -1))
        self._by_id: dict[str, Resident] = {}
        self._by_slot: dict[int, Resident] = {}
        self._policy = Eviction(capacity_bytes, max_slots, clock=clock)
        self._claim: Claim | None = None
        self._pending = PendingCopies(copy_stream)
        self._watchers: list[Callable[[int], None]] = []
        self._serial = 0
        self.copies = CopyBudget()
        self.used_bytes = 0

    @property
    def num_slots_used(self) -> int:
        return len(self._by_id)

    @property
    def num_slots_pinned(self) -> int:
        """Programs that cannot go now: in use, or kept by an explicit pin."""
        return self._policy.num_staying

    @property
    def permanent_bytes(self) -> int:
        """What explicitly pinned programs take."""
        return self._policy.permanent_bytes

    @property
    def is_copying(self) -> bool:
        """Whether ``begin_step`` has something to find out."""
        return bool(self._pending)

    def begin_step(self, copy_bytes: int) -> None:
        """From now on so many bytes may be copied, and what has arrived can be pinned."""
        self.copies.begin(copy_bytes)
        if self._pending.begin_step():
            self._policy.recheck()

    def resident(self, slot: int) -> Resident:
        return self._by_slot[slot]

    def find(self, program_id: str) -> Resident | None:
        return self._by_id.get(program_id)

    def footprint(self, program: PackedProgram) -> int:
        """The bytes that a program takes in the bank."""
        return self._arena.nbytes(program) + sum(tensor.nbytes for tensor in program.extras.values())

    def room_beside_pins(self, program_id: str) -> int:
        """The bytes that a program can have at most: what other explicitly pinned programs leave."""
        own = self._by_id[program_id].nbytes if self._policy.is_permanent(program_id) else 0
        return self.capacity_bytes - self.permanent_bytes + own

    def keep(self, program_id: str) -> None:
        """Pin explicitly: once admitted, the program stays until ``let_go``."""
        self._policy.keep(program_id)
        if self._claim is not None:
            self._claim.draining.discard(program_id)

    def let_go(self, program_id: str) -> None:
        self._policy.let_go(program_id)

    def watch(self, watcher: Callable[[int], None]) -> None:
        """Call ``watcher(serial)`` whenever what a serial stood for has gone or moved."""
        self._watchers.append(watcher)

    def admit(self, program: PackedProgram, tenant: str | None = None, *, insists: bool = False) -> Admission:
        """Copy a program in for a tenant (None: nobody), evicting others as the policy says, and moving some when room lies in pieces.

        One that ``insists`` has waited for long: programs are drained for it, which get no new references until it has come. They are
        taken from those that are nobody's guaranteed share, and meanwhile only tenants that stay within their shares are admitted beside it.
        Where these are not enough, they are taken from all, and nobody is admitted before it.
        """
        program_id, footprint = program.program_id, self.footprint(program)
        if program_id in self._by_id:
            return Admission(self._by_id[program_id])
        if self._claim is not None and self._claim.goes_before(program_id, tenant, footprint):
            return Admission()
        if not self.copies.allows(footprint):
            return Admission(is_deferred=True)
        nbytes, count = self.used_bytes + footprint - self.capacity_bytes, 1 - len(self._free_slots)
        claim = self._claim if self._claim is not None and self._claim.program_id == program_id else None
        shares = claim is None or claim.shares
        victims = self._policy.choose(tenant, nbytes, count, stays=self._pending.stays, shares=shares)
        if victims is None:
            if insists or claim is not None:
                self._claim = self._claim or Claim(self._policy, program_id, tenant)
                self._claim.drain(tenant, nbytes, count)
            return Admission()
        for victim in victims:
            self._policy.evict(victim)
            self._free(victim)
        try:
            resident = self._place(program)
        except COMPUTE_ERRORS as error:
            return Admission(None, tuple(victims), error=error)
        if resident is None:
            return Admission(None, tuple(victims), is_deferred=True)
        self.withdraw(program_id)
        return Admission(resident, tuple(victims))

    def withdraw(self, program_id: str) -> None:
        """The program has come, or nobody wants it any more: nothing is drained for it."""
        if self._claim is not None and self._claim.program_id == program_id:
            self._claim = None

    def evict(self, program_id: str) -> None:
        """Free a program's slot and room. Raises ValueError while sequences use it."""
        if self._policy.is_held(program_id):
            raise ValueError(f"program {program_id} is in use")
        self._policy.remove(program_id)
        self._free(program_id)

    def can_pin(self, program_id: str) -> bool:
        """Whether a resident program takes new references: once it has arrived and, its first step aside, not while it is drained for another."""
        is_draining = self._claim is not None and program_id in self._claim.draining and not self._pending.stays(program_id)
        return not is_draining and not self._pending.is_pending(program_id)

    def pin(self, program_id: str, tenant: str = "", *, again: bool = False) -> int:
        """Take a reference for a tenant's sequence that runs (``again``: it ran before, and is no new use), and return the slot."""
        if not again:
            self._policy.use(program_id, tenant)
        self._policy.hold(program_id, tenant)
        return self._by_id[program_id].slot

    def unpin(self, program_id: str, tenant: str = "") -> None:
        """Give back a reference that the tenant took."""
        self._policy.release(program_id, tenant)

    def close(self) -> None:
        """No copy goes on into memory that is given back with the bank."""
        self._pending.forget_all()

    def row_view(self, width: int) -> Tensor | None:
        """``rows`` as ``(n, width)``, or None when programs are not aligned to this width."""
        return self.rows.view(-1, width) if self._arena.unit % width == 0 else None

    def matrix(self, resident: Resident, offset: int, rank: int, width: int) -> Tensor:
        """A program's matrix ``(rank, width)`` in the base's dtype: a view of the arena or, where held in another, a copy in no budget."""
        held = self.rows[resident.rows_offset : resident.rows_offset + resident.num_rows].view(resident.rows_dtype)
        return held[offset : offset + rank * width].view(rank, width).to(self.rows.dtype)

    def _free(self, program_id: str) -> None:
        resident = self._by_id.pop(program_id)
        del self._by_slot[resident.slot]
        self._free_slots.append(resident.slot)
        self._pending.forget(program_id)
        self._arena.release(resident.start, resident.length)
        self.used_bytes -= resident.nbytes
        if self._claim is not None:
            self._claim.draining.discard(program_id)
        self._tell(resident.serial)

    def _tell(self, serial: int) -> None:
        for watcher in self._watchers:
            watcher(serial)

    def _place(self, program: PackedProgram) -> Resident | None:
        """Install a program that there is room for; None: that takes more copies than are left of this step's."""
        length, resident = self._arena.nbytes(program), None
        start = self._make_room(length)
        try:
            if start is not None and self.copies.allows(self.footprint(program)):
                resident = self._install(program, start, length)
        finally:
            if start is not None and resident is None:
                self._arena.release(start, length)
        return resident

    def _make_room(self, length: int) -> int | None:
        """The start of a range that there is room for, if need be pushed together. None: that takes more than is left of this step's copies."""
        while (start := self._arena.allocate(length)) is None:
            slide = self._arena.next_slide()
            assert slide is not None, "room by the budget is room in the arena"
            if not self.copies.allows(slide.length):
                return None
            self._slide(slide)
        return start

    def _slide(self, slide: Slide) -> None:
        resident = next(item for item in self._by_id.values() if item.length and item.start == slide.start)
        # Steps, which move it, would move what has not arrived.
        self._pending.come_first(resident.program_id)
        self._arena.slide(slide)
        self.copies.spend(slide.length)
        distance = slide.start - slide.to
        moved = replace(
            resident,
            serial=self._next_serial(),
            start=slide.to,
            rows_offset=resident.rows_offset - distance // self.rows.itemsize,
            vectors_offset=resident.vectors_offset - distance // self.vectors.itemsize,
        )
        self._by_id[moved.program_id] = self._by_slot[moved.slot] = moved
        self._tell(resident.serial)

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def _install(self, program: PackedProgram, start: int, length: int) -> Resident:
        # Not as a part of the copy: memory that is allocated on a stream is handed on within it when it is freed, and steps read this.
        extras = {name: torch.empty_like(tensor, device=self.rows.device) for name, tensor in program.extras.items()}

        def copy() -> None:
            self._arena.write(program, start)
            for name, tensor in extras.items():
                tensor.copy_(program.extras[name], non_blocking=True)

        self._pending.run(program.program_id, copy)
        rows_offset, vectors_offset = self._arena.offsets(program, start)
        # Nothing below can fail.
        resident = Resident(
            program_id=program.program_id,
            slot=self._free_slots.pop(),
            serial=self._next_serial(),
            start=start,
            length=length,
            rows_offset=rows_offset,
            vectors_offset=vectors_offset,
            layouts=program.layouts,
            extras=extras,
            invocation_tokens=program.invocation_tokens,
            prologue=program.prologue,
            head=program.head,
            num_rows=self._arena.num_rows(program),
            num_vectors=program.vectors.numel(),
            rows_dtype=self._arena.rows_dtype(program),
            nbytes=self.footprint(program),
            kinds=frozenset(kind for layout in program.layouts.values() for kind in layout.kinds),
        )
        self._by_id[program.program_id] = self._by_slot[resident.slot] = resident
        self._policy.add(program.program_id, resident.nbytes)
        self.used_bytes += resident.nbytes
        self.copies.spend(resident.nbytes)
        return resident
