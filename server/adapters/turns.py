"""Whose turn it is where one is served at a time: the tenant that took the least time so far. Standard library only.

A tenant that was away starts level with those that wait: it can neither save up time nor be made to wait behind another's queue.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class TooManyWaiting(Exception):
    """The tenant has as many waiting as it may; ``retry_after_s`` is a guess at when it has not."""

    def __init__(self, count: int, retry_after_s: float) -> None:
        super().__init__(
            f"{count} of your adapters and combinations are waiting to be prepared; try again in {retry_after_s:.0f} s"
        )
        self.retry_after_s = retry_after_s


class Turns:
    """``async with turns.of(tenant):`` waits for a turn and holds it. For one event loop."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        self._spent: dict[str, float] = {}
        self._holder: str | None = None
        self._last_s = 1.0

    @asynccontextmanager
    async def of(self, tenant: str) -> AsyncIterator[None]:
        """Raises TooManyWaiting, at once."""
        await self._acquire(tenant)
        started = time.monotonic()
        try:
            yield
        finally:
            self._last_s = time.monotonic() - started
            self._spent[tenant] += self._last_s
            self._pass_on()

    async def _acquire(self, tenant: str) -> None:
        queue = self._waiting.get(tenant, deque())
        if len(queue) >= self._max_waiting:
            raise TooManyWaiting(len(queue), min(60.0, max(1.0, self._last_s * len(queue))))
        active = {*self._waiting, *([] if self._holder is None else [self._holder])}
        if tenant not in active:
            level = min((self._spent[other] for other in active), default=0.0)
            self._spent = {name: spent for name, spent in self._spent.items() if name in active or name == tenant}
            self._spent[tenant] = max(self._spent.get(tenant, 0.0), level)
        if self._holder is None:
            self._holder = tenant
            return
        mine = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.cancelled():
                self._leave(tenant, mine)
            else:
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """The next holder: of the tenant that spent the least, who came first."""
        self._holder = None
        while self._waiting and self._holder is None:
            tenant = min(self._waiting, key=lambda name: self._spent[name])
            following = self._waiting[tenant][0]
            self._leave(tenant, following)
            # One that was cancelled a moment ago has not left yet.
            if not following.done():
                self._holder = tenant
                following.set_result(None)

    def _leave(self, tenant: str, waiting: asyncio.Future[None]) -> None:
        queue = self._waiting.get(tenant, deque())
        if waiting in queue:
            queue.remove(waiting)
        if not queue:
            self._waiting.pop(tenant, None)
