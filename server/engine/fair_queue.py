"""Sequences that wait for their turn, in order within a tenant, and the least served tenant first. Standard library only.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", for sequences that run whole.
"""

from __future__ import annotations

from collections import deque

from server.engine.sequence import Sequence


class FairQueue:
    """One queue a tenant. What a tenant has been served is counted in tokens; idleness earns no credit."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Sequence]] = {}
        self._served: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    def add(self, sequence: Sequence) -> None:
        tenant = sequence.tenant
        if tenant not in self._waiting:
            # Level with the least served of those who wait; counters of tenants that went are forgotten.
            level = min((self._served[name] for name in self._waiting), default=0)
            self._served = {name: served for name, served in self._served.items() if name in self._waiting or name == tenant}
            self._served[tenant] = max(self._served.get(tenant, 0), level) if self._waiting else 0
            self._waiting[tenant] = deque()
        self._waiting[tenant].append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out; one that is not queued has gone already."""
        queue = self._waiting.get(sequence.tenant)
        if queue is None or sequence not in queue:
            return
        queue.remove(sequence)
        if not queue:
            del self._waiting[sequence.tenant]

    def candidates(self) -> list[Sequence]:
        """All that wait, in the order of their turns: each one counts for its tenant before the next is looked for."""
        queues = {tenant: deque(queue) for tenant, queue in self._waiting.items()}
        served = {tenant: self._served[tenant] for tenant in queues}
        ordered = []
        while queues:
            tenant = min(queues, key=lambda name: (served[name], queues[name][0].order))
            sequence = queues[tenant].popleft()
            served[tenant] += sequence.num_tokens - sequence.num_prologue_kv
            if not queues[tenant]:
                del queues[tenant]
            ordered.append(sequence)
        return ordered

    def charge(self, sequence: Sequence) -> None:
        """A sequence of the queue is being run."""
        self._served[sequence.tenant] = self._served.get(sequence.tenant, 0) + sequence.num_tokens - sequence.num_prologue_kv
