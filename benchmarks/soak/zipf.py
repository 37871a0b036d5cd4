"""Ten thousand registered adapters, asked for with Zipf's popularity, on a device that holds 32 of them and a host that holds 256.

Blocks of two kinds take turns. In one, requests ask for what the draw says; in the other, requests at the same times ask for the most
popular few, which are resident, so that nothing is loaded. Meanwhile tenants that load nothing stream from the base without a pause,
and the time between their tokens is compared.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks.soak.memory import watched_memory
from benchmarks.soak.percentile import milliseconds, percentile
from benchmarks.soak.probes import TIERS, hits, probe
from benchmarks.soak.small_lora import SmallLora
from benchmarks.soak.stock import Stock, Stocked, fill
from benchmarks.soak.traffic import Ask, Traffic
from server.engine.base_dir import BaseDir
from tests.live import Live, live_server

TENANTS = tuple(f"tenant-{number}" for number in range(8))
_BUSY, _CAPACITY_REQUESTS = 16, 32
"""Requests at once, and in all, when the base's capacity is measured."""
_STEADY = 3
"""Tenants that stream from the base without a pause."""
_SETTLE_S = 1.0
"""Until everything is counted that has been served."""
_WARMING = 8
"""Requests at once while the tiers are filled."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. ``load``: arrivals as a part of the base's capacity; ``device`` and ``host``: budgets, in adapters."""

    adapters: int
    device: int
    host: int
    rank: int
    seconds: float
    rounds: int
    probes: int
    load: float
    threads: int
    dtype: str
    seed: int

    @property
    def few(self) -> int:
        """Adapters that requests of a block without loads ask for: half of what the device holds."""
        return max(1, self.device // 2)


@dataclass(slots=True)
class Block:
    """What came of all blocks of one kind. Times in seconds; ``found``: requests by tier, as the server counted them."""

    first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    """Of the tenants that load nothing."""
    found: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))

    @property
    def hit_rates(self) -> dict[str, float]:
        """Which part of the requests found their adapter in which tier."""
        return {tier: round(count / max(1, sum(self.found.values())), 3) for tier, count in self.found.items()}

    def to_json(self) -> dict[str, Any]:
        return {
            "requests": len(self.first_token),
            "first_token": milliseconds(self.first_token),
            "between_tokens_of_others": milliseconds(self.between_tokens),
            "found": self.found,
            "hit_rates": self.hit_rates,
        }


@dataclass(slots=True)
class ZipfReport:
    """What a run found. ``probes``: seconds to the first token by tier."""

    plan: Plan
    capacity_per_s: float
    asked_for: int
    program_bytes: int
    without_loads: Block = field(default_factory=Block)
    with_loads: Block = field(default_factory=Block)
    probes: dict[str, list[float]] = field(default_factory=dict)
    memory: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    """Requests that were refused, broke off or hung."""

    @property
    def ratio(self) -> float:
        """p99 between tokens of tenants that load nothing, with loads over without."""
        return percentile(self.with_loads.between_tokens, 99) / percentile(self.without_loads.between_tokens, 99)

    def to_json(self) -> dict[str, Any]:
        return {
            "plan": asdict(self.plan),
            "base_capacity_per_s": round(self.capacity_per_s, 2),
            "arrivals_per_s": round(self.capacity_per_s * self.plan.load, 2),
            "adapters_asked_for": self.asked_for,
            "program_bytes": self.program_bytes,
            "without_loads": self.without_loads.to_json(),
            "with_loads": self.with_loads.to_json(),
            "p99_between_tokens_ratio": round(self.ratio, 3),
            "first_token_by_tier": {tier: milliseconds(seconds) for tier, seconds in self.probes.items()},
            "memory": self.memory,
            "failures": self.failures,
        }


def run_zipf(plan: Plan, base: BaseDir, data_dir: Path) -> ZipfReport:
    """Measure the base, fill ``data_dir``, and run the blocks and the probes. Prints its progress."""
    vocab = json.loads((base.path / "config.json").read_text())["vocab_size"]
    with _server(plan, base, data_dir) as live:
        capacity = asyncio.run(_capacity(Traffic(live.url, live.keys, vocab, random.Random(plan.seed))))
    stock = Stock(plan.adapters, TENANTS)
    rng = random.Random(plan.seed)
    warming = [*range(plan.few), *stock.draw(rng, 2 * (plan.device + plan.host))]
    draws = [stock.draw(rng, int(2 * capacity * plan.load * plan.seconds) + 10) for _ in range(plan.rounds)]
    used = {*warming, *(number for draw in draws for number in draw)}
    kind = SmallLora.of(base.path, rank=plan.rank, scale=0.02)
    stocked = asyncio.run(fill(data_dir, stock, base, plan.dtype, kind, used))
    report = ZipfReport(plan, capacity, len(used), stocked.program_bytes)
    budgets = ("--bank-bytes", str(stocked.program_bytes * plan.device), "--host-bytes", str(stocked.program_bytes * plan.host))
    with _server(plan, base, data_dir, *budgets) as live:
        traffic = Traffic(live.url, live.keys, vocab, rng)
        asyncio.run(_Run(traffic, stock, stocked, report).run(warming, draws))
    return report


def _server(plan: Plan, base: BaseDir, data_dir: Path, *flags: str) -> AbstractContextManager[Live]:
    more = ("--dtype", plan.dtype, "--threads", str(plan.threads), "--kv-cache-bytes", "256MiB")
    return live_server(base.path, data_dir, *more, *flags, tenants=TENANTS)


async def _capacity(traffic: Traffic) -> float:
    """Requests a second that the base alone serves when there are always more."""
    async with traffic:
        await traffic.closed([(TENANTS[0], "base")] * 4, at_once=4)
        asks = [(TENANTS[number % len(TENANTS)], "base") for number in range(_CAPACITY_REQUESTS)]
        return _CAPACITY_REQUESTS / await traffic.closed(asks, at_once=_BUSY)


class _Run:
    """The run against the stocked server."""

    def __init__(self, traffic: Traffic, stock: Stock, stocked: Stocked, report: ZipfReport) -> None:
        self._traffic = traffic
        self._stock = stock
        self._stocked = stocked
        self._report = report
        self._others: list[Ask] = [(tenant, "base") for tenant in TENANTS[:_STEADY]]

    async def run(self, warming: Sequence[int], draws: Sequence[Sequence[int]]) -> None:
        plan = self._report.plan
        with Progress() as progress:
            step = progress.add_task("filling host and device", total=2 + 2 * len(draws))
            async with self._traffic:
                await self._traffic.closed([self._ask(number) for number in warming], at_once=_WARMING, tokens=1)
                async with watched_memory() as memory:
                    for number, draw in enumerate(draws):
                        progress.update(step, advance=1, description="without loads")
                        await self._block(self._report.without_loads, [drawn % plan.few for drawn in draw], number)
                        progress.update(step, advance=1, description="with loads")
                        await self._block(self._report.with_loads, draw, number)
                    progress.update(step, advance=1, description="probing the tiers")
                    async with _Steady(self._traffic, self._others):
                        rng = random.Random(plan.seed)
                        programs = self._stocked.programs
                        self._report.probes = await probe(self._traffic, self._stock, programs, rng, plan.probes)
                self._report.memory, self._report.failures = memory.rows(), self._traffic.failures
                progress.update(step, advance=1, description="done")

    async def _block(self, block: Block, numbers: Sequence[int], seed: int) -> None:
        plan = self._report.plan
        # What a block without loads asks for is resident from its first request on.
        await self._traffic.closed([self._ask(number) for number in range(plan.few)], at_once=_WARMING, tokens=1)
        http = self._traffic.https[TENANTS[0]]
        await asyncio.sleep(_SETTLE_S)
        before = await hits(http)
        async with _Steady(self._traffic, self._others) as steady:
            replies = await self._traffic.arriving(
                [self._ask(number) for number in numbers],
                times=random.Random(seed),
                per_s=self._report.capacity_per_s * plan.load,
                seconds=plan.seconds,
            )
        await asyncio.sleep(_SETTLE_S)
        after = await hits(http)
        block.first_token += [reply.first_token_s for reply in replies if not reply.code]
        block.between_tokens += steady.gaps
        for tier in TIERS:
            block.found[tier] += after[tier] - before[tier]

    def _ask(self, number: int) -> Ask:
        return self._stock.tenant(number), self._stock.name(number)


class _Steady:
    """Tenants that ask without a pause while this is entered. Then ``gaps`` has the seconds between their tokens."""

    def __init__(self, traffic: Traffic, asks: Sequence[Ask]) -> None:
        self._traffic = traffic
        self._asks = asks
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[list[float]]] = []
        self.gaps: list[float] = []

    async def __aenter__(self) -> _Steady:
        self._tasks = [asyncio.create_task(self._stream(ask)) for ask in self._asks]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        for gaps in await asyncio.gather(*self._tasks):
            self.gaps += gaps

    async def _stream(self, ask: Ask) -> list[float]:
        gaps: list[float] = []
        while not self._stop.is_set():
            gaps += (await self._traffic.ask(ask)).gaps
        return gaps
