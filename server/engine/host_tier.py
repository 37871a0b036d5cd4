"""Programs that are kept ready in host memory, under a byte budget. Knows neither the device nor how programs get here.

Room is made when a load is about to start, and kept for it until it has ended, so that the budget holds at any time. The one exception:
a program larger than the budget is let in when the tier can be emptied for it, since otherwise nobody could ever use it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from server.adapters.eviction import Eviction
from server.adapters.packed import PackedProgram


class HostTier:
    """Programs by id. Which of them go for others is ``eviction``'s business. ``clock`` is in seconds."""

    def __init__(self, capacity_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.capacity_bytes = capacity_bytes
        self._policy = Eviction(capacity_bytes, clock=clock)
        self._programs: dict[str, PackedProgram] = {}
        self._sizes: dict[str, int] = {}
        self._reserved: dict[str, int] = {}
        self.used_bytes = 0

    @property
    def reserved_bytes(self) -> int:
        """What is kept free for loads under way."""
        return sum(self._reserved.values())

    def get(self, program_id: str) -> PackedProgram | None:
        return self._programs.get(program_id)

    def nbytes(self, program_id: str) -> int:
        """What a program that is here takes: its file, which its tensors are views of."""
        return self._sizes[program_id]

    def use(self, program_id: str, tenant: str) -> None:
        """A request of a tenant uses the program, here or on the device: a copy of it that is here is worth keeping."""
        if program_id in self._programs:
            self._policy.use(program_id, tenant)

    def recheck(self) -> None:
        """``stays`` of ``reserve`` may say something else from now on."""
        self._policy.recheck()

    def reserve(
        self, program_id: str, nbytes: int, tenant: str | None, stays: Callable[[str], bool], *, shares: bool = True
    ) -> list[str] | None:
        """Make room for a load, for a tenant. Returns the programs that went for it; None: there is no room now.

        Programs that ``stays`` says stay, and with ``shares`` what is guaranteed to others; see ``recheck``. What is being loaded counts as the
        tenant's already.
        """
        missing = self.used_bytes + self.reserved_bytes + min(nbytes, self.capacity_bytes) - self.capacity_bytes
        victims = self._policy.choose(tenant, missing, 0, stays=lambda name: name in self._reserved or stays(name), shares=shares)
        if victims is None:
            return None
        for victim in victims:
            self._policy.evict(victim)
            self._remove(victim)
        self._reserved[program_id] = nbytes
        self._policy.add(program_id, nbytes, tenant)
        return victims

    def keep(self, program: PackedProgram) -> None:
        """A load has ended: the program takes the room that was kept for it."""
        program_id = program.program_id
        nbytes = self._reserved.pop(program_id)
        self._programs[program_id], self._sizes[program_id] = program, nbytes
        self.used_bytes += nbytes

    def cancel(self, program_id: str) -> None:
        """A load has ended with nothing."""
        del self._reserved[program_id]
        self._policy.remove(program_id)

    def drop(self, program_id: str) -> None:
        """Free a program, if it is here."""
        if program_id in self._programs:
            self._policy.remove(program_id)
            self._remove(program_id)

    def _remove(self, program_id: str) -> None:
        del self._programs[program_id]
        self.used_bytes -= self._sizes.pop(program_id)
