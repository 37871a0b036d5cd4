"""Time to the first token by where the adapter's program was. What is said of a probe is what the server counted while it ran.

Nobody else asks for adapters meanwhile, so that what is counted is the one probe under way.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Mapping
from pathlib import Path

import httpx

from benchmarks.soak.scrape import scrape
from benchmarks.soak.stock import Stock
from benchmarks.soak.traffic import Traffic

TIERS = ("resident", "host", "disk")


async def hits(http: httpx.AsyncClient) -> dict[str, int]:
    """How many requests found their adapter in which tier, since the server started. The engine tells it every quarter of a second."""
    figures = await scrape(http)
    return {tier: int(figures.value("medley_adapter_hits_total", tier=tier)) for tier in TIERS}


async def probe(
    traffic: Traffic, stock: Stock, programs: Mapping[int, Path], rng: random.Random, wanted: int
) -> dict[str, list[float]]:
    """Seconds to the first token, by tier, for up to ``wanted`` adapters of each. Disk means the disk: the page cache is told to let go."""
    found: dict[str, list[float]] = {tier: [] for tier in TIERS}
    candidates = rng.sample(sorted(programs), len(programs))
    for number in candidates:
        ask = (stock.tenant(number), stock.name(number))
        http = traffic.https[ask[0]]
        expected = await _tier(http, ask[1])
        if len(found[expected]) >= wanted:
            continue
        if expected == "disk":
            _forget_pages(programs[number])
        # Once more, because it is resident now.
        for _ in range(2):
            before = await hits(http)
            reply = await traffic.ask(ask, tokens=2)
            if reply.code:
                break
            while (after := await hits(http)) == before:
                await asyncio.sleep(0.05)
            (tier,) = (tier for tier in TIERS if after[tier] > before[tier])
            found[tier].append(reply.first_token_s)
        if all(len(seconds) >= wanted for seconds in found.values()):
            break
    return found


async def _tier(http: httpx.AsyncClient, name: str) -> str:
    """Where the server says that an adapter's program is."""
    reply = await http.get(f"/v1/adapters/{name}")
    reply.raise_for_status()
    states = set(reply.json()["residency"].values())
    return next((tier for tier in ("resident", "host") if tier in states), "disk")


def _forget_pages(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
