"""Sequences that wait for their turn, in order within a tenant, and the least served tenant first. Standard library only.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models": input costs 1, output 2, and idleness earns no
credit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from heapq import heapify, heappop, heappush

from server.engine.sequence import Sequence

INPUT_PRICE = 1
OUTPUT_PRICE = 2


class FairQueue:
    """One queue a tenant, and what each tenant has been served."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Sequence]] = {}
        self._served: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._waiting.get(sequence.tenant, ())

    def add(self, sequence: Sequence, running: Collection[Sequence] = ()) -> None:
        """Queue a sequence. The tenants of ``running`` are active though they may not wait: one that was idle starts level with the least
        served active one, and counters of tenants that went are forgotten."""
        tenant = sequence.tenant
        if tenant not in self._waiting:
            active = {item.tenant for item in running} | self._waiting.keys()
            if tenant not in active:
                level = min((self._served[name] for name in active if name in self._served), default=0)
                self._served = {name: served for name, served in self._served.items() if name in active or name == tenant}
                self._served[tenant] = max(self._served.get(tenant, 0), level) if active else 0
            self._waiting[tenant] = deque()
        self._waiting[tenant].append(sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence that has run before, as its tenant's next one."""
        self._waiting.setdefault(sequence.tenant, deque()).appendleft(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a queued sequence out."""
        queue = self._waiting[sequence.tenant]
        queue.remove(sequence)
        if not queue:
            del self._waiting[sequence.tenant]

    def candidates(self) -> Iterator[Sequence]:
        """All that wait, in the order of their turns: each one counts for its tenant before the next is looked for. They may be removed
        and charged for meanwhile."""
        queues = {tenant: deque(queue) for tenant, queue in self._waiting.items()}
        turns = [(self._served[tenant], queue[0].order, tenant) for tenant, queue in queues.items()]
        heapify(turns)
        while turns:
            served, _, tenant = heappop(turns)
            sequence = queues[tenant].popleft()
            if queues[tenant]:
                heappush(turns, (served + sequence.num_rows * INPUT_PRICE, queues[tenant][0].order, tenant))
            yield sequence

    def charge(self, tenant: str, price: int) -> None:
        """A tenant is being served."""
        self._served[tenant] = self._served.get(tenant, 0) + price
