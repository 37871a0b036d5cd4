"""What this server's engine holds, from the engine's own events: the truth that is published to other replicas and shown to operators. It
knows programs and the digests of their adapters, no names and no tenants.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from server.engine.types import ProgramEvent, ProgramState

MAX_REMEMBERED = 4096
"""Programs that are not held any more, of which the past is still known. What is held is bounded by the engine's memory."""
MAX_CHANGES = 1024
"""Changes kept for whoever follows them; beyond it, all of the state is the shorter message."""

Change = tuple[str, ProgramState]
"""A program and the state that it came into."""


@dataclass(slots=True)
class Resident:
    """A program and its past in this server. Times are in seconds since the epoch; ``nbytes`` is what it takes where it is now.

    ``load_seconds`` has the last duration of each step that took any: from disk to ``host``, from there to ``resident``. ``evictions`` are
    departures from the device, ``failures`` loads that failed.
    """

    program_id: str
    digests: tuple[str, ...] = ()
    state: ProgramState = ProgramState.STORED
    nbytes: int = 0
    since: float = field(default_factory=time.time)
    last_used: float | None = None
    loads: int = 0
    admissions: int = 0
    evictions: int = 0
    failures: int = 0
    load_seconds: dict[str, float] = field(default_factory=dict)
    tenants: set[str] = field(default_factory=set)
    """Who asked for it: nobody else is to learn that it is here."""


class Residents:
    """All programs of one engine. ``process`` identifies the engine's process, None while there is none: another one holds nothing yet.

    For one event loop.
    """

    def __init__(self, process: Callable[[], int | None]) -> None:
        self._process = process
        self._seen = process()
        self._held: OrderedDict[str, Resident] = OrderedDict()
        self._past: OrderedDict[str, Resident] = OrderedDict()
        self._changes: list[Change] | None = None

    def apply(self, event: ProgramEvent) -> None:
        """The engine says that a program changed state."""
        self._renew()
        item = self._find(event.program_id)
        before, item.state = item.state, event.state
        if event.state is not before:
            item.since = time.time()
        if before is ProgramState.RESIDENT and event.state is not ProgramState.RESIDENT:
            item.evictions += event.state is not ProgramState.DRAINING
        elif before is ProgramState.DRAINING and event.state in (ProgramState.HOST, ProgramState.STORED):
            item.evictions += 1
        if before is ProgramState.LOADING:
            item.loads += event.state is ProgramState.HOST
            item.failures += event.state is ProgramState.STORED
        item.admissions += event.state is ProgramState.RESIDENT and before not in (ProgramState.DRAINING, ProgramState.RESIDENT)
        if event.seconds:
            item.load_seconds[event.state.value] = event.seconds
        item.nbytes = 0 if event.state is ProgramState.STORED else event.nbytes or item.nbytes
        self._place(item)
        if self._changes is not None:
            self._changes.append((event.program_id, event.state))
            if len(self._changes) > MAX_CHANGES:
                self._changes = None

    def asked(self, program_id: str, digests: tuple[str, ...], tenant: str) -> None:
        """A tenant wants a program, which these adapters are."""
        self._renew()
        item = self._find(program_id)
        item.digests, item.last_used = digests, time.time()
        item.tenants.add(tenant)
        self._place(item)

    def of(self, program_id: str) -> Resident | None:
        """What is known of a program, None when nothing is."""
        self._renew()
        return self._held.get(program_id) or self._past.get(program_id)

    def __iter__(self) -> Iterator[Resident]:
        """The programs that the engine holds, the longest unchanged and unused first."""
        self._renew()
        return iter(list(self._held.values()))

    def states(self) -> dict[str, str]:
        """Program → state, of what the engine holds."""
        return {item.program_id: item.state.value for item in self}

    def take_changes(self) -> list[Change] | None:
        """Changes since the last call, in order. None: all of the state is to be read anew, as it is at first and after a restart."""
        self._renew()
        changes, self._changes = self._changes, []
        return changes

    def _renew(self) -> None:
        """Another engine process, or none: nothing is held any more."""
        process = self._process()
        if process == self._seen:
            return
        self._seen, self._changes = process, None
        for item in list(self._held.values()):
            item.state, item.nbytes, item.since = ProgramState.STORED, 0, time.time()
            self._place(item)

    def _find(self, program_id: str) -> Resident:
        return self._held.get(program_id) or self._past.get(program_id) or Resident(program_id)

    def _place(self, item: Resident) -> None:
        """Among the held ones or the past ones, as the newest."""
        self._held.pop(item.program_id, None)
        self._past.pop(item.program_id, None)
        (self._past if item.state is ProgramState.STORED else self._held)[item.program_id] = item
        while len(self._past) > MAX_REMEMBERED:
            self._past.popitem(last=False)
