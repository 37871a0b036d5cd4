"""A data directory as a server finds it after thousands of uploads: every adapter in the store, the program files of those that are used.

Goes the way of an upload (stage, check, lower, commit) without HTTP. An adapter that nobody will ask for is not lowered; its facts are
those of the first one, from which it differs in its numbers only.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.progress import track

from adapter_store.staging import StagedAdapter, Staging
from adapter_store.store import Store
from benchmarks.programs import at_hand
from benchmarks.soak.small_lora import SmallLora
from server.adapters.lowerer import LowererClient
from server.engine.base_dir import BaseDir


@dataclass(frozen=True, slots=True)
class Stock:
    """Adapters by number, the most popular first; tenants own them in turn."""

    count: int
    tenants: Sequence[str]

    def tenant(self, number: int) -> str:
        return self.tenants[number % len(self.tenants)]

    def name(self, number: int) -> str:
        return f"adapter-{number}"

    def draw(self, rng: random.Random, draws: int) -> list[int]:
        """Numbers of the adapters of as many requests; popularity is Zipf's with exponent 1."""
        weights = list(accumulate(1 / rank for rank in range(1, self.count + 1)))
        return rng.choices(range(self.count), cum_weights=weights, k=draws)


@dataclass(frozen=True, slots=True)
class Stocked:
    """What was made. ``programs``: files by adapter number; ``program_bytes``: of each of them on the device."""

    programs: dict[int, Path]
    program_bytes: int


async def fill(data_dir: Path, stock: Stock, base: BaseDir, dtype: str, kind: SmallLora, used: Collection[int]) -> Stocked:
    """Store all adapters and lower the ``used`` ones, of which there is at least one."""
    store = Store.open(data_dir / "store", max_upload_bytes=1 << 30)
    lowerer = LowererClient(base.path, base.digest, dtype, data_dir / "programs")
    await lowerer.start(())
    programs: dict[int, Path] = {}
    facts: dict[str, Any] = {}

    def stage(staging: Staging, number: int) -> StagedAdapter:
        for name, content in kind.files(number).items():
            with staging.open(name) as writer:
                writer.write(content)
        return staging.finish()

    def add(number: int) -> None:
        with store.begin_upload() as staging:
            store.commit(stock.tenant(number), stock.name(number), stage(staging, number), facts)

    try:
        for number in track(sorted(used), description="registering and lowering those that will be asked for"):
            with store.begin_upload() as staging:
                staged = stage(staging, number)
                with lowerer.using(((staged.digest, 1.0),), since=time.monotonic()):
                    program = await lowerer.ensure(stock.tenant(number), staged.digest, at_hand(staged.paths))
                programs[number], facts = program.path, program.facts
                store.commit(stock.tenant(number), stock.name(number), staged, facts)
        rest = [number for number in range(stock.count) if number not in programs]
        with ThreadPoolExecutor(4) as pool:
            for _ in track(pool.map(add, rest), description="registering the others", total=len(rest)):
                pass
    finally:
        await lowerer.stop()
        store.close()
    return Stocked(programs, int(facts["program_bytes"]))
