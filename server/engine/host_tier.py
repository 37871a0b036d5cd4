"""Programs that are kept ready in host memory, under a byte budget. Knows neither the device nor how programs get here.

Room is made when a load is about to start, and kept for it until it has ended, so that the budget holds at any time. The one exception:
a program larger than the budget is let in when the tier can be emptied for it, since otherwise nobody could ever use it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container

from server.adapters.eviction import Eviction
from server.adapters.packed import PackedProgram


class HostTier:
    """Programs by id. Which of them go for others is ``eviction``'s business. ``clock`` is in seconds."""

    def __init__(self, capacity_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.capacity_bytes = capacity_bytes
        self._policy = Eviction(capacity_bytes, clock=clock)
        self._programs: dict[str, PackedProgram] = {}
        self._reserved: dict[str, int] = {}
        self.used_bytes = 0

    @property
    def reserved_bytes(self) -> int:
        """What is kept free for loads under way."""
        return sum(self._reserved.values())

    def get(self, program_id: str) -> PackedProgram | None:
        return self._programs.get(program_id)

    def use(self, program_id: str, tenant: str) -> None:
        """A request of a tenant uses the program, here or on the device: a copy of it that is here is worth keeping."""
        if program_id in self._programs:
            self._policy.use(program_id, tenant)

    def reserve(self, program_id: str, nbytes: int, tenant: str | None, held: Container[str]) -> list[str] | None:
        """Make room for a load, for a tenant. Returns the programs that went for it; None: there is no room now. ``held`` ones stay."""
        nbytes = min(nbytes, self.capacity_bytes)
        missing = self.used_bytes + self.reserved_bytes + nbytes - self.capacity_bytes
        victims = self._policy.choose(tenant, missing, 0, held=held)
        if victims is None:
            return None
        for victim in victims:
            self._policy.evict(victim)
            self.used_bytes -= self._programs.pop(victim).nbytes
        self._reserved[program_id] = nbytes
        return victims

    def keep(self, program: PackedProgram) -> None:
        """A load has ended: the program takes the room that was kept for it."""
        self.cancel(program.program_id)
        self._programs[program.program_id] = program
        self._policy.add(program.program_id, program.nbytes)
        self.used_bytes += program.nbytes

    def cancel(self, program_id: str) -> None:
        """A load has ended with nothing."""
        self._reserved.pop(program_id, None)

    def drop(self, program_id: str) -> None:
        """Free a program, if it is here."""
        program = self._programs.pop(program_id, None)
        if program is not None:
            self._policy.remove(program_id)
            self.used_bytes -= program.nbytes
