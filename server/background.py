"""Work that nobody waits for: started and kept until it ends, and told of in the log when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any

log = logging.getLogger(__name__)


class Background:
    """Short pieces of work. For one event loop."""

    def __init__(self) -> None:
        self._under_way: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin, and return at once."""
        task = asyncio.create_task(work)
        self._under_way.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("background work failed", exc_info=task.exception())


@contextlib.asynccontextmanager
async def endless(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run endless work beside what is in the context. Its end before that is a bug, and said at once."""
    task = asyncio.create_task(work)
    task.add_done_callback(_tell_end)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def _tell_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        log.error("endless work ended", exc_info=task.exception())
