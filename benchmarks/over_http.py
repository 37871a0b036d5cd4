"""Load over real HTTP: all requests at once, and the time until the last answer is complete."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import httpx


async def _all(url: str, path: str, bodies: Sequence[dict[str, Any]]) -> tuple[float, list[Any]]:
    # As many connections as requests: a client's limit would hide the server's own queue.
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=900, limits=limits) as client:
        started = time.perf_counter()
        replies = await asyncio.gather(*(client.post(path, json=body) for body in bodies))
        seconds = time.perf_counter() - started
    for reply in replies:
        reply.raise_for_status()
    return seconds, [reply.json() for reply in replies]


def seconds_for_all(url: str, path: str, bodies: Sequence[dict[str, Any]]) -> tuple[float, list[Any]]:
    """Post all bodies at once. Returns seconds and the answers' JSON; raises httpx.HTTPError when one is refused."""
    return asyncio.run(_all(url, path, bodies))
