"""Programs at hand: who uses one, who waits for one, which are pinned or were asked for ahead. Never reads what a program means.

Nobody waits for another's program. Requests come first: what was asked for ahead gets what they leave of a step.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from server.adapters.bank import Bank
from server.engine.host_tier import HostTier
from server.engine.loader import Loaded, Loader
from server.engine.sequence import Sequence
from server.engine.tiers import Attempt, Tiers, too_large
from server.engine.types import ProgramEvent, ProgramRef, RequestError

MAX_PREFETCHES = 64
"""Programs that are brought nearer ahead of requests, at a time. Of more, those that were asked for first are forgotten."""

_LOAD_FAILED = RequestError("adapter_load_failed", "the adapter's program cannot be loaded; push the adapter again")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What loads that ended mean: sequences that can be queued, and programs that cannot be had, with the reason."""

    ready: list[Sequence] = field(default_factory=list)
    failed: dict[str, RequestError] = field(default_factory=dict)


class Programs:
    """Over the tiers of one engine. ``counters``: see EngineStats. ``clock`` is in seconds.

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
        self._tiers = Tiers(bank, host, loader, counters, needs_host=self._needs_host, clock=clock)
        self._counters = counters
        self._pins_fit = pins_fit
        self._users: Counter[str] = Counter()
        self._waiting: dict[str, list[Sequence]] = {}
        self._refused: dict[str, RequestError] = {}
        self._pins: set[str] = set()
        self._pins_to_bring: dict[str, ProgramRef] = {}
        self._pinned_sizes: dict[str, int] = {}
        self._prefetches: dict[str, ProgramRef] = {}

    @property
    def has_pending(self) -> bool:
        """Whether the next step has something to do here though no load has ended: a copy that did not fit into this one or is under way, or a
        refusal."""
        return self._tiers.is_deferred or self.bank.is_copying or bool(self._refused)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a load."""
        return sum(len(group) for group in self._waiting.values())

    def enter(self, sequence: Sequence) -> bool:
        """Take a new sequence, which ``leave`` is called for at its end. Returns what ``prepare`` does."""
        program_id = sequence.program.program_id
        if not sequence.program.is_base:
            self._users[program_id] += 1
            self._want(program_id)
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
            self._tiers.load(ref, sequence.tenant)
            return False
        sequence.start_at(at_hand.invocation_tokens)
        # A program that does not act on this prompt does not classify it either.
        if at_hand.head is not None and not sequence.program.is_base:
            sequence.head_pooling = at_hand.head.pooling
        prologue = at_hand.prologue
        sequence.start_with(prologue.num_kv, prologue.num_tokens, prologue.position_shift)
        return True

    def arrivals(self) -> Arrivals:
        """Begin a step: collect loads that ended since the last one, bring what is pinned, and start the loads that there is room for."""
        self._tiers.begin_step()
        arrivals = Arrivals(failed=self._refused)
        self._refused = {}
        for loaded in self.loader.finished():
            self._receive(loaded, arrivals)
        for ref in list(self._pins_to_bring.values()):
            self._bring_pinned(ref)
        self._tiers.start_loads()
        return arrivals

    def prefetch(self) -> None:
        """Bring what was asked for ahead: with copies, loader threads and room that nobody's request needs."""
        for ref in list(self._prefetches.values()):
            program_id = ref.program_id
            if self.bank.find(program_id) is None and not self._users[program_id]:
                if self.host.get(program_id) is None:
                    if self._tiers.load_ahead(ref):
                        continue
                elif self._tiers.admit(ref, None).is_deferred:
                    return
            del self._prefetches[program_id]
            self._tidy(program_id)

    def pin(self, sequence: Sequence) -> bool:
        """Admit the sequence's program if need be, take a reference and set the slot. False: not now."""
        ref = sequence.program
        if ref.is_base:
            return True
        program_id = ref.program_id
        if program_id in self._refused:
            return False
        if self.bank.find(program_id) is None:
            attempt = self._tiers.admit(ref, sequence.tenant)
            if attempt.problem is not None:
                self._refused[program_id] = attempt.problem
            if not attempt.is_admitted:
                return False
        if not self.bank.can_pin(program_id):
            return False
        sequence.slot = self.bank.pin(program_id, sequence.tenant, again=sequence.has_run)
        if not sequence.has_run:
            self.host.use(program_id, sequence.tenant)
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
        self._tiers.dropped.add(program_id)
        self._prefetches.pop(program_id, None)
        self.unpin_program(program_id)
        if program_id in self._tiers.dropped:
            self._tiers.tell(program_id)

    def pin_program(self, ref: ProgramRef) -> None:
        """Bring a program to the device as soon as there is room, and keep it there. An event with the reason ``pin_limit`` (explicit pins
        would take too much) or ``load_failed``: it is not pinned."""
        self._want(ref.program_id)
        self._pins.add(ref.program_id)
        self._pins_to_bring[ref.program_id] = ref

    def unpin_program(self, program_id: str) -> None:
        """The program is one among others again."""
        self._pins.discard(program_id)
        self._pins_to_bring.pop(program_id, None)
        self._pinned_sizes.pop(program_id, None)
        self.bank.let_go(program_id)
        self._tidy(program_id)

    def load_program(self, ref: ProgramRef) -> None:
        """Bring a program to the host, and to the device, if that takes nothing from anybody's share and delays no request."""
        self._want(ref.program_id)
        self._prefetches[ref.program_id] = ref
        if len(self._prefetches) > MAX_PREFETCHES:
            forgotten = next(iter(self._prefetches))
            del self._prefetches[forgotten]
            self._tidy(forgotten)

    def take_events(self) -> list[ProgramEvent]:
        """State changes since the last call."""
        return self._tiers.whereabouts.take_events()

    def _want(self, program_id: str) -> None:
        """What was dropped, and is still here for those that use it, is wanted again."""
        if program_id in self._tiers.dropped:
            self._tiers.dropped.remove(program_id)
            self._tiers.tell(program_id)

    def _needs_host(self, program_id: str) -> bool:
        """Whether somebody waits for a program to go from the host to the device."""
        return (program_id in self._users or program_id in self._pins) and self.bank.find(program_id) is None

    def _receive(self, loaded: Loaded, arrivals: Arrivals) -> None:
        program_id, program = loaded.program_id, loaded.program
        footprint = self.bank.footprint(program) if program is not None else 0
        if program is None or footprint > self.bank.capacity_bytes:
            problem = _LOAD_FAILED if program is None else too_large(footprint, self.bank.capacity_bytes)
            log.error("program %s cannot be loaded: %s", program_id[:12], loaded.problem or problem.message)
            self.host.cancel(program_id)
            self._tiers.tell(program_id, reason="load_failed")
            self._waiting.pop(program_id, None)
            self._prefetches.pop(program_id, None)
            self.unpin_program(program_id)
            arrivals.failed[program_id] = problem
        elif program_id in self._tiers.dropped and not self._users[program_id]:
            self.host.cancel(program_id)
            self._tidy(program_id)
        else:
            self.host.keep(program)
            self._tiers.tell(program_id, seconds=loaded.seconds)
            arrivals.ready.extend(sequence for sequence in self._waiting.pop(program_id, []) if self.prepare(sequence))

    def _bring_pinned(self, ref: ProgramRef) -> None:
        """A pin counts, and holds, once its program is at hand and its size known: of several at a time, what is loaded first goes first."""
        program_id = ref.program_id
        resident, program = self.bank.find(program_id), self.host.get(program_id)
        if resident is None and program is None:
            self._tiers.load(ref, None)
            return
        if program_id not in self._pinned_sizes:
            nbytes = resident.nbytes if resident else self.bank.footprint(program) if program else 0
            if not self._pins_fit([*self._pinned_sizes.values(), nbytes]):
                self.unpin_program(program_id)
                self._tiers.tell(program_id, reason="pin_limit")
                return
            self._pinned_sizes[program_id] = nbytes
            self.bank.keep(program_id)
        attempt = Attempt(is_admitted=True) if resident else self._tiers.admit(ref, None)
        if attempt.is_admitted:
            del self._pins_to_bring[program_id]
        elif attempt.problem is not None:
            self.unpin_program(program_id)
            self._tiers.tell(program_id, reason="load_failed")

    def _tidy(self, program_id: str) -> None:
        """Forget what nobody wants any more, and free it if it was dropped."""
        if self._users[program_id] > 0 or program_id in self._pins:
            return
        del self._users[program_id]
        self._waiting.pop(program_id, None)
        self._tiers.forget(program_id)
