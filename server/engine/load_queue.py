"""Loads that wait for room in the host tier: in order within a tenant, tenants in turn. Standard library only; knows no tier."""

from __future__ import annotations

from dataclasses import dataclass

from server.engine.types import ProgramRef


@dataclass(frozen=True, slots=True)
class WaitingLoad:
    """A program that is to be loaded for a tenant (None: for nobody's request), ``nbytes`` of it, and since when, in seconds."""

    ref: ProgramRef
    tenant: str | None
    nbytes: int
    since: float


class LoadQueue:
    """One queue a tenant. A program that several tenants want stands in each of theirs."""

    def __init__(self) -> None:
        # The tenant whose turn is next comes first.
        self._by_tenant: dict[str | None, dict[str, WaitingLoad]] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._by_tenant.values())

    def add(self, load: WaitingLoad) -> None:
        """Queue a load, unless its tenant waits for it already."""
        self._by_tenant.setdefault(load.tenant, {}).setdefault(load.ref.program_id, load)

    def next_ones(self) -> list[WaitingLoad]:
        """Each tenant's next load, in the order of the tenants' turns."""
        return [next(iter(queue.values())) for queue in self._by_tenant.values()]

    def started(self, load: WaitingLoad) -> None:
        """A load waits no longer, for whomever, and its tenant has had its turn."""
        self.discard(load.ref.program_id)
        if (queue := self._by_tenant.pop(load.tenant, None)) is not None:
            self._by_tenant[load.tenant] = queue

    def discard(self, program_id: str) -> None:
        """Nobody wants a program any more."""
        for tenant, queue in list(self._by_tenant.items()):
            queue.pop(program_id, None)
            if not queue:
                del self._by_tenant[tenant]
