"""Programs from disk to the host and from there to the device: makes room, counts, and tells of it. Knows no sequence, only who asks.

Of the copies to the device, and on it, a step makes no more than ``COPY_BYTES_PER_STEP``.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from server.adapters.bank import Bank
from server.adapters.eviction import WINDOW_S
from server.engine.host_tier import HostTier
from server.engine.load_queue import LoadQueue, WaitingLoad
from server.engine.loader import Loader
from server.engine.types import ProgramRef, RequestError
from server.engine.whereabouts import Whereabouts

COPY_BYTES_PER_STEP = 32 << 20
"""A processor copies as much in less time than a step of a small model takes: about 10 ms. A larger program is a step's only copy."""

_ADMISSION_FAILED = RequestError("internal_error", "the engine failed to bring the adapter's program to the device")

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Attempt:
    """What became of an admission: done, or to be tried in the next step, or never to be for this problem, or some time later."""

    is_admitted: bool = False
    is_deferred: bool = False
    problem: RequestError | None = None


class Tiers:
    """The device's bank, the host tier, and the loader that fills it. ``counters``: see EngineStats. ``clock`` is in seconds.

    ``needs_host`` says whether somebody waits for a program to go from the host to the device. ``dropped`` programs are to be freed once
    nobody uses them.
    """

    def __init__(
        self,
        bank: Bank,
        host: HostTier,
        loader: Loader,
        counters: Counter[str],
        *,
        needs_host: Callable[[str], bool],
        clock: Callable[[], float],
    ) -> None:
        self.bank, self.host, self.loader = bank, host, loader
        self.dropped: set[str] = set()
        self.whereabouts = Whereabouts(bank, host, loader)
        self.is_deferred = False
        self._counters = counters
        self._needs_host = needs_host
        self._clock = clock
        self._loads = LoadQueue()
        self._blocked: dict[str, float] = {}

    def begin_step(self) -> None:
        """New copies may be made, and those that are done count. ``is_deferred`` says from then on whether some had to be left for the next step."""
        self.bank.begin_step(COPY_BYTES_PER_STEP)
        self.is_deferred = False

    def tell(self, program_id: str, *, seconds: float = 0.0, reason: str = "") -> None:
        """Tell where a program is now, if that is news."""
        self.whereabouts.tell(program_id, drains=program_id in self.dropped, seconds=seconds, reason=reason)

    def load(self, ref: ProgramRef, tenant: str | None) -> None:
        """Bring a program to the host for a tenant (None: nobody), when it is its turn and there is room."""
        if self.loader.is_loading(ref.program_id):
            return
        is_first = not self._loads
        self._loads.add(self._waiting_load(ref, tenant))
        if is_first:
            self.start_loads()

    def start_loads(self) -> None:
        """As far as the host tier has room, tenants in turn. For one that has waited for too long shares do not hold, and room is kept."""
        self.host.recheck()
        has_started = True
        while has_started and (waiting := self._loads.next_ones()):
            longest = min(waiting, key=lambda load: load.since)
            if self._clock() - longest.since >= WINDOW_S:
                has_started = self._start(longest, shares=False)
            else:
                has_started = sum(self._start(load) for load in waiting) > 0

    def load_ahead(self, ref: ProgramRef) -> bool:
        """Load a program that nobody waits for yet, as soon as nothing else is to be loaded. False: there is no room that is nobody's."""
        if self.loader.is_loading(ref.program_id) or self.loader.is_busy or self._loads:
            return True
        self.host.recheck()
        return self._start(self._waiting_load(ref, None))

    def admit(self, ref: ProgramRef, tenant: str | None) -> Attempt:
        """Bring a program to the device for a tenant (None: nobody); one that is not in the host either is loaded first."""
        program_id = ref.program_id
        program = self.host.get(program_id)
        if program is None:
            self.load(ref, tenant)
            return Attempt()
        footprint, room = self.bank.footprint(program), self.bank.room_beside_pins(program_id)
        if footprint > room:
            return Attempt(problem=too_large(footprint, room))
        now = self._clock()
        insists = now - self._blocked.get(program_id, now) >= WINDOW_S
        started = time.perf_counter()
        admission = self.bank.admit(program, tenant, insists=insists)
        for evicted in admission.evicted:
            self._counters["evictions"] += 1
            self.tell(evicted, reason="evicted")
        if admission.error is not None:
            log.error("program %s cannot be admitted", program_id[:12], exc_info=admission.error)
            return Attempt(problem=_ADMISSION_FAILED)
        self.is_deferred |= admission.is_deferred
        if admission.resident is None:
            self._blocked.setdefault(program_id, now)
            return Attempt(is_deferred=admission.is_deferred)
        self._blocked.pop(program_id, None)
        self._counters["admissions"] += 1
        self.tell(program_id, seconds=time.perf_counter() - started)
        return Attempt(is_admitted=True)

    def forget(self, program_id: str) -> None:
        """Nobody wants a program any more: nothing waits for it, and if it was dropped, it goes."""
        self._blocked.pop(program_id, None)
        self._loads.discard(program_id)
        self.bank.withdraw(program_id)
        # A load that is under way cannot be stopped: it is thrown away when it ends.
        if program_id in self.dropped and not self.loader.is_loading(program_id):
            self.dropped.remove(program_id)
            is_resident = self.bank.find(program_id) is not None
            self._counters["drops"] += is_resident or self.host.get(program_id) is not None
            self.host.drop(program_id)
            if is_resident:
                self.bank.evict(program_id)
            self.tell(program_id, reason="dropped")

    def _waiting_load(self, ref: ProgramRef, tenant: str | None) -> WaitingLoad:
        return WaitingLoad(ref, tenant, self.loader.size(ref), self._clock())

    def _start(self, load: WaitingLoad, *, shares: bool = True) -> bool:
        program_id = load.ref.program_id
        # Another tenant's turn may have started it just now.
        if self.loader.is_loading(program_id):
            return False
        evicted = self.host.reserve(program_id, load.nbytes, load.tenant, self._needs_host, shares=shares)
        if evicted is None:
            return False
        for name in evicted:
            self._counters["host_evictions"] += 1
            self.tell(name, reason="evicted")
        self._loads.started(load)
        self.loader.request(load.ref)
        self._counters["loads"] += 1
        self.tell(program_id)
        return True


def too_large(nbytes: int, room: int) -> RequestError:
    """A program that the device has no room for, whatever goes."""
    return RequestError("program_too_large", f"the adapter takes {nbytes} bytes on the device and the bank has {room} for it")
