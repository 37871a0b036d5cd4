"""Requests of many tenants on SmolLM2: some arrive at random times, some tenants ask all the time. Prompts never repeat."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import httpx

from benchmarks.soak.streams import Reply, completions

PROMPT_TOKENS, NEW_TOKENS = 24, 24

Ask = tuple[str, str]
"""Tenant, and the model that it asks for."""


@dataclass(slots=True)
class Traffic:
    """The tenants' side of one server. Use it as an asynchronous context manager. ``failures``: requests that were refused, broke off or hung."""

    url: str
    keys: Mapping[str, str]
    vocab_size: int
    rng: random.Random
    failures: list[str] = field(default_factory=list)
    https: dict[str, httpx.AsyncClient] = field(default_factory=dict)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> Traffic:
        for tenant, key in self.keys.items():
            limits = httpx.Limits(max_connections=None)
            http = httpx.AsyncClient(base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=60, limits=limits)
            self.https[tenant] = await self._stack.enter_async_context(http)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def ask(self, ask: Ask, *, tokens: int = NEW_TOKENS) -> Reply:
        """One request."""
        tenant, model = ask
        prompt = [self.rng.randrange(100, self.vocab_size - 100) for _ in range(PROMPT_TOKENS)]
        reply = await completions(self.https[tenant], model, prompt, tokens)
        if reply.code:
            self.failures.append(f"{tenant}, {model}: {reply.code}")
        return reply

    async def closed(self, asks: Iterable[Ask], *, at_once: int, tokens: int = NEW_TOKENS) -> float:
        """All requests, so many at a time. Seconds that they took."""
        started = time.monotonic()
        waiting = iter(asks)

        async def work() -> None:
            for ask in waiting:
                await self.ask(ask, tokens=tokens)

        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
        return time.monotonic() - started

    async def arriving(self, asks: Iterable[Ask], *, times: random.Random, per_s: float, seconds: float) -> list[Reply]:
        """Requests that arrive at random ``times`` (Poisson), whether earlier ones are done or not, for this long."""
        end = time.monotonic() + seconds
        tasks = []
        async with asyncio.TaskGroup() as group:
            for ask in asks:
                await asyncio.sleep(times.expovariate(per_s))
                if time.monotonic() > end:
                    break
                tasks.append(group.create_task(self.ask(ask)))
        return [task.result() for task in tasks]
