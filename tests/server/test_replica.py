"""A replica's two sides without an engine's process: what it publishes, and what others' announcements make it do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from adapter_store.residency import LOST, LocalResidency
from adapter_store.store import Store
from server.adapters.lowerer import LowererClient
from server.engine.client import EngineClient
from server.engine.settings import EngineSettings
from server.engine.types import ProgramEvent, ProgramState
from server.pins import Pins
from server.quarantine import Quarantine
from server.replica import Replica, deleted
from server.residents import MAX_CHANGES, Residents
from tests.adapter_store.uploads import good, stage

BASE = "0" * 64


class Engine(EngineClient):
    """A client whose process was never started; what it is told to drop is kept."""

    dropped: list[str]
    process: int | None = 1

    async def drop_program(self, program_id: str) -> None:
        self.dropped.append(program_id)


class Parts:
    """A replica and what it works with."""

    def __init__(self, name: str, registry: LocalResidency, directory: Path) -> None:
        self.registry = registry
        self.directory = directory
        self.engine = Engine(EngineSettings(model_dir="", base_digest=BASE, dtype="float32"), on_event=lambda _: None)
        self.engine.dropped = []
        self.residents = Residents(lambda: self.engine.process)
        self.store = Store.open(directory / "store")
        self.lowerer = LowererClient(directory, BASE, "float32", directory / name)
        pins = Pins(self.store, self.lowerer, self.engine)
        self.replica = Replica(name, registry, self.residents, self.store, self.lowerer, self.engine, pins, Quarantine())

    def commit(self, name: str, seed: int) -> str:
        staging, staged = stage(self.directory / "upload", good(seed))
        with staging:
            return self.store.commit("acme", name, staged, {}).digest

    def hold(self, digest: str) -> str:
        """As if a request had brought the adapter's program into host memory."""
        program = self.lowerer.program_id(digest)
        self.residents.asked(program, (digest,), "acme")
        self.residents.apply(ProgramEvent(program, ProgramState.HOST, 10, 0.1))
        return program


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[tuple[Parts, Parts]]:
    registry = LocalResidency()
    one, other = (Parts(name, registry, tmp_path) for name in ("one", "other"))
    yield one, other
    for parts in (one, other):
        await parts.engine.stop()
        await parts.lowerer.stop()
        parts.store.close()


@asynccontextmanager
async def running(*work: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(item()) for item in work]
    try:
        yield
        assert not any(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


async def becomes(found: Callable[[], Coroutine[Any, Any, object]], wanted: object) -> None:
    deadline = time.monotonic() + 60
    while (now := await found()) != wanted:
        assert time.monotonic() < deadline, now
        await asyncio.sleep(0.02)


async def test_the_registry_follows_the_residents_whatever_happens_to_it(two: tuple[Parts, Parts]) -> None:
    one, _ = two
    residents, registry = one.residents, one.registry

    async def known() -> object:
        return await registry.programs("one")

    async with running(one.replica.publish):
        residents.apply(ProgramEvent("p", ProgramState.LOADING))
        await becomes(known, {"p": "loading"})
        residents.apply(ProgramEvent("p", ProgramState.HOST, 1, 0.1))
        residents.apply(ProgramEvent("q", ProgramState.LOADING))
        await becomes(known, {"p": "host", "q": "loading"})
        # It lost the lease.
        await registry.forget("one")
        residents.apply(ProgramEvent("p", ProgramState.RESIDENT, 1, 0.1))
        await becomes(known, {"p": "resident", "q": "loading"})
        # It has it wrong, so that the next change is impossible.
        await registry.enter("one", 10, {"p": "loading", "stranger": "host"})
        residents.apply(ProgramEvent("p", ProgramState.DRAINING))
        await becomes(known, {"p": "draining", "q": "loading"})
        # More than can be told one by one.
        for _ in range(MAX_CHANGES):
            residents.apply(ProgramEvent("q", ProgramState.LOADING))
        residents.apply(ProgramEvent("q", ProgramState.HOST, 1, 0.1))
        await becomes(known, {"p": "draining", "q": "host"})
        one.engine.process = 2
        await becomes(known, {})
        residents.apply(ProgramEvent("p", ProgramState.LOADING))
        await becomes(known, {"p": "loading"})
    assert await registry.replicas() == {}


async def test_what_nobody_has_any_more_is_dropped_on_all_replicas(two: tuple[Parts, Parts]) -> None:
    one, other = two
    doomed, kept = one.commit("doomed", 1), one.commit("kept", 2)
    program = other.hold(doomed)
    other.hold(kept)
    one.hold(doomed)
    async with running(one.replica.publish, one.replica.follow, other.replica.follow):
        await asyncio.sleep(0.05)
        # An announcement is no proof: the store knows better.
        one.replica.announce(deleted([doomed, kept]))
        one.replica.announce({"kind": "of a later version"})
        one.replica.announce({"kind": "deleted"})
        await asyncio.sleep(0.3)
        assert (one.engine.dropped, other.engine.dropped) == ([], [])
        one.store.delete("acme", "doomed")
        await one.replica.delete([doomed])
        assert one.engine.dropped == [program]

        async def dropped() -> object:
            return other.engine.dropped

        await becomes(dropped, [program])


async def test_who_missed_a_deletion_finds_it_out(two: tuple[Parts, Parts]) -> None:
    one, other = two
    doomed, kept = one.commit("doomed", 1), one.commit("kept", 2)
    program = other.hold(doomed)
    other.hold(kept)
    async with running(other.replica.follow):
        await asyncio.sleep(0.05)
        one.store.delete("acme", "doomed")
        await other.registry.announce(LOST)

        async def dropped() -> object:
            return other.engine.dropped

        await becomes(dropped, [program])
