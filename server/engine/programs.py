"""Programs at hand: what is on the device, what is in host memory, who waits for a load. Copies weights, never reads their meaning."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass, field

from server.adapters.bank import Bank
from server.engine.loader import Loaded, Loader
from server.engine.sequence import Sequence
from server.engine.types import ProgramEvent, ProgramState, RequestError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What loads that ended mean: sequences that can be queued, and programs that cannot be had, with the reason."""

    ready: list[Sequence] = field(default_factory=list)
    failed: dict[str, RequestError] = field(default_factory=dict)


class Programs:
    """Device tier and host tier over one bank and one loader. ``counters`` gets ``loads`` and ``evictions``."""

    def __init__(self, bank: Bank, loader: Loader, counters: Counter[str]) -> None:
        self.bank = bank
        self.loader = loader
        self._counters = counters
        self._waiting: dict[str, list[Sequence]] = {}
        self._dropped: set[str] = set()
        self._events: list[ProgramEvent] = []

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a load."""
        return sum(len(group) for group in self._waiting.values())

    def prepare(self, sequence: Sequence) -> bool:
        """Whether the sequence's program is at hand; then also where it starts to act, and what with.

        False: the sequence waits now, and ``arrivals`` will return it.
        """
        ref = sequence.program
        if ref.is_base:
            return True
        self._dropped.discard(ref.program_id)
        at_hand = self.bank.find(ref.program_id) or self.loader.get(ref.program_id)
        if at_hand is None:
            self._waiting.setdefault(ref.program_id, []).append(sequence)
            self._load(sequence)
            return False
        sequence.start_at(at_hand.invocation_tokens)
        # A program that does not act on this prompt does not classify it either.
        if at_hand.head is not None and not sequence.program.is_base:
            sequence.head_pooling = at_hand.head.pooling
        prologue = at_hand.prologue
        sequence.start_with(prologue.num_kv, prologue.num_tokens, prologue.position_shift)
        return True

    def arrivals(self) -> Arrivals:
        """Collect loads that ended since the last call."""
        arrivals = Arrivals()
        for loaded in self.loader.finished():
            waiting = self._waiting.pop(loaded.program_id, [])
            problem = self._problem(loaded)
            if problem is None and loaded.program is not None:
                self._events.append(ProgramEvent(loaded.program_id, ProgramState.HOST, loaded.program.nbytes, loaded.seconds))
                arrivals.ready.extend(sequence for sequence in waiting if self.prepare(sequence))
            elif problem is not None:
                log.error("program %s cannot be loaded: %s", loaded.program_id[:12], loaded.problem or problem.message)
                self._events.append(ProgramEvent(loaded.program_id, ProgramState.STORED, reason="load_failed"))
                arrivals.failed[loaded.program_id] = problem
        return arrivals

    def pin(self, sequence: Sequence) -> bool:
        """Admit the sequence's program if need be, take a reference and set the slot. False: not now."""
        ref = sequence.program
        if ref.is_base:
            return True
        if self.bank.find(ref.program_id) is None and not self._admit(sequence):
            return False
        sequence.slot = self.bank.pin(ref.program_id)
        return True

    def unpin(self, sequence: Sequence) -> None:
        """Give the reference back that ``pin`` took."""
        if sequence.slot:
            sequence.slot = 0
            self.bank.unpin(sequence.program.program_id)
            self._evict_dropped(sequence.program.program_id)

    def leave(self, sequence: Sequence) -> None:
        """A sequence that may be waiting for a load waits no longer."""
        group = self._waiting.get(sequence.program.program_id)
        if group is not None and sequence in group:
            group.remove(sequence)

    def drop(self, program_id: str) -> None:
        """Free a program's device memory as soon as no sequence uses it."""
        self._dropped.add(program_id)
        self._evict_dropped(program_id)

    def take_events(self) -> list[ProgramEvent]:
        """State changes since the last call."""
        events, self._events = self._events, []
        return events

    def _load(self, sequence: Sequence) -> None:
        if self.loader.request(sequence.program):
            self._counters["loads"] += 1
            self._events.append(ProgramEvent(sequence.program.program_id, ProgramState.LOADING))

    def _admit(self, sequence: Sequence) -> bool:
        program = self.loader.get(sequence.program.program_id)
        if program is None:
            # It left the host tier while the sequence was queued: fetch it again.
            self._load(sequence)
            return False
        started = time.monotonic()
        resident, evicted = self.bank.admit(program)
        for program_id in evicted:
            self._counters["evictions"] += 1
            state = ProgramState.HOST if self.loader.get(program_id) else ProgramState.STORED
            self._events.append(ProgramEvent(program_id, state, reason="evicted"))
        if resident is None:
            return False
        seconds = time.monotonic() - started
        self._events.append(ProgramEvent(program.program_id, ProgramState.RESIDENT, resident.nbytes, seconds))
        return True

    def _evict_dropped(self, program_id: str) -> None:
        if program_id in self._dropped and self.bank.find(program_id) and not self.bank.is_pinned(program_id):
            self._dropped.discard(program_id)
            self.bank.evict(program_id)
            self._events.append(ProgramEvent(program_id, ProgramState.STORED, reason="dropped"))

    def _problem(self, loaded: Loaded) -> RequestError | None:
        if loaded.program is None:
            return RequestError("adapter_load_failed", "the adapter's program cannot be loaded; push the adapter again")
        if not self.bank.fits(loaded.program.nbytes):
            return RequestError(
                "program_too_large",
                f"the adapter takes {loaded.program.nbytes} bytes on the device and the bank holds {self.bank.capacity_bytes}",
            )
        return None
