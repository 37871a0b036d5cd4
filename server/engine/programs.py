"""Programs at hand: what is on the device, what is in host memory, who waits for a load. Copies weights, never reads their meaning.

Nobody waits for another's program: loads run on threads, and of the copies to the device a step does no more than ``COPY_BYTES_PER_STEP``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from server.adapters.bank import Bank
from server.adapters.eviction import WINDOW_S
from server.engine.host_tier import HostTier
from server.engine.loader import Loaded, Loader
from server.engine.sequence import Sequence
from server.engine.types import ProgramEvent, ProgramRef, ProgramState, RequestError

COPY_BYTES_PER_STEP = 32 << 20
"""A processor copies as much in less time than a step of a small model takes: about 10 ms. A larger program is a step's only one."""

_LOAD_FAILED = RequestError("adapter_load_failed", "the adapter's program cannot be loaded; push the adapter again")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What loads that ended mean: sequences that can be queued, and programs that cannot be had, with the reason."""

    ready: list[Sequence] = field(default_factory=list)
    failed: dict[str, RequestError] = field(default_factory=dict)


class Programs:
    """Device tier and host tier, and the loader that fills them. ``counters``: see EngineStats. ``clock`` is in seconds.

    ``pins_fit`` says whether explicit pins may take as much: see EngineSettings.
    """

    def __init__(
        self,
        bank: Bank,
        host: HostTier,
        loader: Loader,
        counters: Counter[str],
        *,
        pins_fit: Callable[[Collection[int]], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.bank, self.host, self.loader = bank, host, loader
        self.has_deferred = False
        self._counters = counters
        self._pins_fit = pins_fit
        self._clock = clock
        self._users: Counter[str] = Counter()
        self._waiting: dict[str, list[Sequence]] = {}
        self._to_load: dict[str, tuple[ProgramRef, str | None]] = {}
        self._blocked: dict[str, float] = {}
        self._refused: dict[str, RequestError] = {}
        self._dropped: set[str] = set()
        self._pins: dict[str, ProgramRef] = {}
        self._pinned_sizes: dict[str, int] = {}
        self._prefetches: dict[str, ProgramRef] = {}
        self._told: dict[str, ProgramState] = {}
        self._events: list[ProgramEvent] = []
        self._copied_before = 0

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a load."""
        return sum(len(group) for group in self._waiting.values())

    def enter(self, sequence: Sequence) -> bool:
        """Take a new sequence, which ``leave`` is called for at its end. Returns what ``prepare`` does."""
        program_id = sequence.program.program_id
        if not sequence.program.is_base:
            self._users[program_id] += 1
            self._dropped.discard(program_id)
            tier = "resident" if self.bank.find(program_id) else "host" if self.host.get(program_id) else "disk"
            self._counters[f"{tier}_hits"] += 1
        return self.prepare(sequence)

    def prepare(self, sequence: Sequence) -> bool:
        """Whether the sequence's program is at hand; then also where it starts to act, and what with.

        False: the sequence waits now, and ``arrivals`` will return it.
        """
        ref = sequence.program
        if ref.is_base:
            return True
        at_hand = self.bank.find(ref.program_id) or self.host.get(ref.program_id)
        if at_hand is None:
            self._waiting.setdefault(ref.program_id, []).append(sequence)
            self._load(ref, sequence.tenant)
            return False
        sequence.start_at(at_hand.invocation_tokens)
        # A program that does not act on this prompt does not classify it either.
        if at_hand.head is not None and not sequence.program.is_base:
            sequence.head_pooling = at_hand.head.pooling
        prologue = at_hand.prologue
        sequence.start_with(prologue.num_kv, prologue.num_tokens, prologue.position_shift)
        return True

    def arrivals(self) -> Arrivals:
        """Begin a step: collect loads that ended since the last one, start those that there is room for, and bring what is pinned."""
        self._copied_before, self.has_deferred = self.bank.copied_bytes, False
        arrivals = Arrivals(failed=self._refused)
        self._refused = {}
        for loaded in self.loader.finished():
            self._receive(loaded, arrivals)
        for ref in list(self._pins.values()):
            self._bring_pinned(ref)
        for ref in list(self._prefetches.values()):
            self._bring_prefetched(ref)
        self._start_loads()
        return arrivals

    def pin(self, sequence: Sequence) -> bool:
        """Admit the sequence's program if need be, take a reference and set the slot. False: not now."""
        ref = sequence.program
        if ref.is_base:
            return True
        if self.bank.find(ref.program_id) is None:
            if not self._admit(ref, sequence.tenant):
                return False
        elif not self.bank.can_pin(ref.program_id):
            return False
        sequence.slot = self.bank.pin(ref.program_id, sequence.tenant)
        self.host.use(ref.program_id, sequence.tenant)
        return True

    def unpin(self, sequence: Sequence) -> None:
        """Give the reference back that ``pin`` took."""
        if sequence.slot:
            sequence.slot = 0
            self.bank.unpin(sequence.program.program_id, sequence.tenant)

    def leave(self, sequence: Sequence) -> None:
        """A sequence has ended, wherever it was, and has given its reference back."""
        ref = sequence.request.program
        if ref.is_base:
            return
        group = self._waiting.get(ref.program_id, [])
        if sequence in group:
            group.remove(sequence)
        self._users[ref.program_id] -= 1
        self._tidy(ref.program_id)

    def drop(self, program_id: str) -> None:
        """Free a program's memory, on the device and in the host: at once, or when the last sequence that uses it has ended."""
        self._dropped.add(program_id)
        self._prefetches.pop(program_id, None)
        self.unpin_program(program_id)

    def pin_program(self, ref: ProgramRef) -> None:
        """Bring a program to the device as soon as there is room, and keep it there. An event with the reason ``pin_limit``: it is not
        pinned, because explicit pins would take too much."""
        self._dropped.discard(ref.program_id)
        self._pins[ref.program_id] = ref

    def unpin_program(self, program_id: str) -> None:
        """The program is one among others again."""
        self._pins.pop(program_id, None)
        self._pinned_sizes.pop(program_id, None)
        self.bank.let_go(program_id)
        self._tidy(program_id)

    def load_program(self, ref: ProgramRef) -> None:
        """Bring a program to the host, and to the device if that takes nothing from anybody's share."""
        self._dropped.discard(ref.program_id)
        self._prefetches[ref.program_id] = ref

    def take_events(self) -> list[ProgramEvent]:
        """State changes since the last call."""
        events, self._events = self._events, []
        return events

    def _load(self, ref: ProgramRef, tenant: str | None) -> None:
        if not self.loader.is_loading(ref.program_id):
            self._to_load.setdefault(ref.program_id, (ref, tenant))
            self._start_loads()

    def _start_loads(self) -> None:
        """In the order in which they were asked for, as far as the host tier has room."""
        while self._to_load:
            program_id, (ref, tenant) = next(iter(self._to_load.items()))
            needed = self._users.keys() | self._pins.keys()
            held = {name for name in needed if self.bank.find(name) is None}
            evicted = self.host.reserve(program_id, self.loader.size(ref), tenant, held)
            if evicted is None:
                return
            for name in evicted:
                self._counters["host_evictions"] += 1
                self._note(name, reason="evicted")
            del self._to_load[program_id]
            self.loader.request(ref)
            self._counters["loads"] += 1
            self._note(program_id)

    def _receive(self, loaded: Loaded, arrivals: Arrivals) -> None:
        program_id, program = loaded.program_id, loaded.program
        footprint = self.bank.footprint(program) if program is not None else 0
        if program is None or footprint > self.bank.capacity_bytes:
            problem = _LOAD_FAILED if program is None else _too_large(footprint, self.bank.capacity_bytes)
            log.error("program %s cannot be loaded: %s", program_id[:12], loaded.problem or problem.message)
            self.host.cancel(program_id)
            self._note(program_id, reason="load_failed")
            self._waiting.pop(program_id, None)
            self._prefetches.pop(program_id, None)
            self.unpin_program(program_id)
            arrivals.failed[program_id] = problem
        elif program_id in self._dropped and not self._users[program_id]:
            self.host.cancel(program_id)
            self._tidy(program_id)
        else:
            self.host.keep(program)
            self._note(program_id, seconds=loaded.seconds)
            arrivals.ready.extend(sequence for sequence in self._waiting.pop(program_id, []) if self.prepare(sequence))

    def _bring_pinned(self, ref: ProgramRef) -> None:
        """A pin counts, and holds, once its program is at hand and its size known: of several at a time, what is loaded first goes first."""
        program_id = ref.program_id
        resident, program = self.bank.find(program_id), self.host.get(program_id)
        if resident is None and program is None:
            self._load(ref, None)
            return
        if program_id not in self._pinned_sizes:
            nbytes = resident.nbytes if resident else self.bank.footprint(program) if program else 0
            if not self._pins_fit([*self._pinned_sizes.values(), nbytes]):
                del self._pins[program_id]
                self._note(program_id, reason="pin_limit")
                self._tidy(program_id)
                return
            self._pinned_sizes[program_id] = nbytes
            self.bank.keep(program_id)
        if resident is None:
            self._admit(ref, None)

    def _bring_prefetched(self, ref: ProgramRef) -> None:
        if self.bank.find(ref.program_id) is None and self.host.get(ref.program_id) is None:
            self._load(ref, None)
        elif self.bank.find(ref.program_id) is not None or self._admit(ref, None) or not self.has_deferred:
            del self._prefetches[ref.program_id]
            self._tidy(ref.program_id)

    def _admit(self, ref: ProgramRef, tenant: str | None) -> bool:
        program_id = ref.program_id
        program = self.host.get(program_id)
        if program is None:
            # It left both tiers while the sequence was queued: fetch it again.
            self._load(ref, tenant)
            return False
        footprint, room = self.bank.footprint(program), self.bank.room_beside_pins(program_id)
        spent = self.bank.copied_bytes - self._copied_before
        if footprint > room:
            self._refused[program_id] = _too_large(footprint, room)
        if footprint > room or (spent and spent + footprint > COPY_BYTES_PER_STEP):
            self.has_deferred = True
            return False
        now = self._clock()
        insists = now - self._blocked.get(program_id, now) >= WINDOW_S
        started = time.perf_counter()
        admission = self.bank.admit(program, tenant, insists=insists, move_bytes=COPY_BYTES_PER_STEP - spent)
        for evicted in admission.evicted:
            self._counters["evictions"] += 1
            self._note(evicted, reason="evicted")
        if admission.resident is None:
            self.has_deferred |= admission.is_moving
            self._blocked.setdefault(program_id, now)
            return False
        self._blocked.pop(program_id, None)
        self._counters["admissions"] += 1
        self._note(program_id, seconds=time.perf_counter() - started)
        return True

    def _tidy(self, program_id: str) -> None:
        """Forget what nobody wants any more, and free it if it was dropped."""
        if self._users[program_id] > 0 or program_id in self._pins:
            return
        del self._users[program_id]
        self._waiting.pop(program_id, None)
        self._blocked.pop(program_id, None)
        self.bank.withdraw(program_id)
        if program_id not in self._prefetches:
            self._to_load.pop(program_id, None)
        # A load that is under way cannot be stopped: it is thrown away when it ends.
        if program_id in self._dropped and not self.loader.is_loading(program_id):
            self._dropped.discard(program_id)
            self.host.drop(program_id)
            if self.bank.find(program_id) is not None:
                self.bank.evict(program_id)
            self._counters["drops"] += 1
            self._note(program_id, reason="dropped")

    def _note(self, program_id: str, *, seconds: float = 0.0, reason: str = "") -> None:
        """Tell where a program is now, if that has changed or there is something to say about it."""
        resident, program = self.bank.find(program_id), self.host.get(program_id)
        state, nbytes = ProgramState.STORED, 0
        if resident is not None:
            state, nbytes = ProgramState.RESIDENT, resident.nbytes
        elif program is not None:
            state, nbytes = ProgramState.HOST, program.nbytes
        elif self.loader.is_loading(program_id):
            state = ProgramState.LOADING
        if self._told.get(program_id, ProgramState.STORED) is not state or reason == "pin_limit":
            self._events.append(ProgramEvent(program_id, state, nbytes, seconds, reason))
        if state is ProgramState.STORED:
            self._told.pop(program_id, None)
        else:
            self._told[program_id] = state


def _too_large(nbytes: int, room: int) -> RequestError:
    return RequestError("program_too_large", f"the adapter takes {nbytes} bytes on the device and the bank has {room} for it")
