"""The residency registry: which replica holds which program, in which state. One interface, one conformance suite.

A replica's entries live as long as its lease; one that stops its heartbeats disappears for others.

    stored → loading → host → resident → draining
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from adapter_store.errors import StoreError

STATES = ("stored", "loading", "host", "resident", "draining")
TRANSITIONS: dict[str, frozenset[str]] = {
    "stored": frozenset({"loading", "host", "resident"}),
    "loading": frozenset({"host", "resident", "stored"}),
    "host": frozenset({"resident", "stored", "loading"}),
    "resident": frozenset({"host", "draining", "stored"}),
    "draining": frozenset({"host", "stored"}),
}


class IllegalTransition(StoreError):
    """A program cannot go from the state it is in to the one asked for."""

    code = "illegal_transition"


class ResidencyRegistry(Protocol):
    """Facts about replicas, published by themselves. ``stored`` is the absence of an entry."""

    async def heartbeat(self, replica: str, ttl_s: float) -> None:
        """Extend the replica's lease."""

    async def publish(self, replica: str, program_id: str, state: str, nbytes: int = 0) -> None:
        """A program of the replica changed state. Raises IllegalTransition; saying the same state again is no error."""

    async def holders(self, program_id: str) -> dict[str, str]:
        """Live replicas that hold the program, with the state."""

    async def programs(self, replica: str) -> dict[str, str]:
        """What a live replica holds, with the state."""

    async def forget(self, replica: str) -> None:
        """The replica is leaving, or starts anew: drop its lease and entries."""

    async def close(self) -> None:
        """Release connections."""


def check_transition(current: str, wanted: str) -> None:
    """Raise IllegalTransition unless ``wanted`` may follow ``current``."""
    if wanted not in STATES:
        raise IllegalTransition(f"{wanted!r} is not a state; states are {', '.join(STATES)}")
    if wanted != current and wanted not in TRANSITIONS[current]:
        raise IllegalTransition(f"a program that is {current} cannot become {wanted}")


class LocalResidency:
    """The registry of a single process. ``clock`` is monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or (lambda: asyncio.get_running_loop().time())
        self._leases: dict[str, float] = {}
        self._entries: dict[str, dict[str, str]] = {}

    async def heartbeat(self, replica: str, ttl_s: float) -> None:
        if not self._is_live(replica):
            self._entries.pop(replica, None)
        self._leases[replica] = self._clock() + ttl_s

    async def publish(self, replica: str, program_id: str, state: str, nbytes: int = 0) -> None:
        entries = self._entries.setdefault(replica, {})
        check_transition(entries.get(program_id, "stored"), state)
        if state == "stored":
            entries.pop(program_id, None)
        else:
            entries[program_id] = state

    async def holders(self, program_id: str) -> dict[str, str]:
        return {
            replica: entries[program_id]
            for replica, entries in self._entries.items()
            if program_id in entries and self._is_live(replica)
        }

    async def programs(self, replica: str) -> dict[str, str]:
        return dict(self._entries.get(replica, {})) if self._is_live(replica) else {}

    async def forget(self, replica: str) -> None:
        self._leases.pop(replica, None)
        self._entries.pop(replica, None)

    async def close(self) -> None:
        """Nothing is open."""

    def _is_live(self, replica: str) -> bool:
        return self._leases.get(replica, float("-inf")) > self._clock()
