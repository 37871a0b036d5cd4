"""The residency registry: which replica holds which program, in which state, and what replicas tell each other. One interface, one
conformance suite. It knows neither engines nor adapters.

A replica's entries live as long as its lease; one that stops its heartbeats disappears for others.

    stored → loading → host → resident → draining
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Final, Protocol

from adapter_store.errors import StoreError

STATES = ("stored", "loading", "host", "resident", "draining")
TRANSITIONS: dict[str, frozenset[str]] = {
    "stored": frozenset({"loading", "host", "resident"}),
    "loading": frozenset({"host", "resident", "stored"}),
    "host": frozenset({"resident", "stored", "loading"}),
    "resident": frozenset({"host", "draining", "stored"}),
    # What was deleted may be pushed again before the last request on it has ended.
    "draining": frozenset({"host", "stored", "resident"}),
}
MAX_UNREAD = 1024
"""Messages that wait for a subscriber in this process."""

Message = dict[str, Any]
"""What replicas tell each other: JSON, with a ``kind``."""
LOST: Final[Message] = {"kind": "lost"}
"""Messages may have been missed: whoever follows them reads anew what they are about."""


class IllegalTransition(StoreError):
    """A program cannot go from the state it is in to the one asked for."""

    code = "illegal_transition"


class LeaseExpired(StoreError):
    """The replica has no lease, so that nobody would see what it publishes: it must ``enter`` first."""


class ResidencyRegistry(Protocol):
    """Facts about replicas, published by themselves. ``stored`` is the absence of an entry.

    Everything raises StoreUnavailable when the registry cannot be reached, except ``messages``, which waits until it can. What was asked
    may then have been done, or be done later: the replica enters again.
    """

    async def enter(self, replica: str, ttl_s: float, programs: Mapping[str, str]) -> None:
        """Take a lease with exactly these programs and their states, whatever was known before. Raises IllegalTransition for no state."""

    async def heartbeat(self, replica: str, ttl_s: float) -> bool:
        """Extend the replica's lease. False: there was none any more, and it starts with nothing."""

    async def publish(self, replica: str, program_id: str, state: str) -> None:
        """A program of the replica changed state. Raises IllegalTransition and LeaseExpired; saying the same state again is no error."""

    async def holders(self, program_id: str) -> dict[str, str]:
        """Live replicas that hold the program, with the state."""

    async def programs(self, replica: str) -> dict[str, str]:
        """What a live replica holds, with the state."""

    async def replicas(self) -> dict[str, dict[str, str]]:
        """All live replicas, with what they hold: replica → program → state."""

    async def leases(self) -> dict[str, float]:
        """All live replicas, with the seconds that their leases still last."""

    async def forget(self, replica: str) -> None:
        """The replica is leaving: drop its lease and entries."""

    async def announce(self, message: Message) -> None:
        """Tell all replicas that listen now, the own one included: what messages ask for may be done twice."""

    def messages(self) -> AsyncGenerator[Message, None]:
        """What is announced from now on, in order, without end. LOST comes first of all, and after each interruption once it is over."""

    async def close(self) -> None:
        """Release connections."""


def check_state(state: str) -> None:
    """Raise IllegalTransition unless ``state`` is one."""
    if state not in STATES:
        raise IllegalTransition(f"{state!r} is not a state; states are {', '.join(STATES)}")


def illegal(current: str, wanted: str) -> IllegalTransition:
    """The refusal of a change that TRANSITIONS does not have."""
    return IllegalTransition(f"a program that is {current} cannot become {wanted}")


class LocalResidency:
    """The registry of a single process. ``clock`` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._ends: dict[str, float] = {}
        self._entries: dict[str, dict[str, str]] = {}
        self._subscribers: set[asyncio.Queue[Message]] = set()

    async def enter(self, replica: str, ttl_s: float, programs: Mapping[str, str]) -> None:
        for state in programs.values():
            check_state(state)
        self._entries[replica] = {program: state for program, state in programs.items() if state != "stored"}
        self._ends[replica] = self._clock() + ttl_s

    async def heartbeat(self, replica: str, ttl_s: float) -> bool:
        lasted = replica in self._live()
        if not lasted:
            self._entries[replica] = {}
        self._ends[replica] = self._clock() + ttl_s
        return lasted

    async def publish(self, replica: str, program_id: str, state: str) -> None:
        check_state(state)
        entries = self._live().get(replica)
        if entries is None:
            raise LeaseExpired(f"replica {replica} has no lease")
        current = entries.get(program_id, "stored")
        if state != current and state not in TRANSITIONS[current]:
            raise illegal(current, state)
        if state == "stored":
            entries.pop(program_id, None)
        else:
            entries[program_id] = state

    async def holders(self, program_id: str) -> dict[str, str]:
        return {replica: entries[program_id] for replica, entries in self._live().items() if program_id in entries}

    async def programs(self, replica: str) -> dict[str, str]:
        return dict(self._live().get(replica, {}))

    async def replicas(self) -> dict[str, dict[str, str]]:
        return {replica: dict(entries) for replica, entries in self._live().items()}

    async def leases(self) -> dict[str, float]:
        return {replica: self._ends[replica] - self._clock() for replica in self._live()}

    async def forget(self, replica: str) -> None:
        self._ends.pop(replica, None)
        self._entries.pop(replica, None)

    async def announce(self, message: Message) -> None:
        text = json.dumps(message)
        for unread in self._subscribers:
            if unread.full():
                while not unread.empty():
                    unread.get_nowait()
                unread.put_nowait(LOST)
            unread.put_nowait(json.loads(text))

    async def messages(self) -> AsyncGenerator[Message, None]:
        unread: asyncio.Queue[Message] = asyncio.Queue(MAX_UNREAD)
        self._subscribers.add(unread)
        try:
            yield LOST
            while True:
                yield await unread.get()
        finally:
            self._subscribers.discard(unread)

    async def close(self) -> None:
        """Nothing is open."""

    def _live(self) -> dict[str, dict[str, str]]:
        """The entries of replicas that have a lease; those of others are dropped."""
        now = self._clock()
        for replica in [replica for replica, end in self._ends.items() if end <= now]:
            del self._ends[replica], self._entries[replica]
        return self._entries
