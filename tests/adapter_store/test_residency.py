"""One conformance suite for the registry in this process and for the one in a real Redis (Valkey) server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from adapter_store.errors import StoreUnavailable
from adapter_store.residency import STATES, TRANSITIONS, IllegalTransition, LocalResidency, ResidencyRegistry
from adapter_store.residency_redis import RedisResidency
from tests.redis import running_redis


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_redis(tmp_path_factory.mktemp("valkey")) as (url, _):
        yield url


@pytest.fixture(params=["local", "redis"])
async def registry(request: pytest.FixtureRequest) -> AsyncIterator[ResidencyRegistry]:
    made: ResidencyRegistry = (
        LocalResidency() if request.param == "local" else RedisResidency(request.getfixturevalue("redis_url"))
    )
    yield made
    for replica in ("one", "two"):
        await made.forget(replica)
    await made.close()


async def test_holders_and_programs(registry: ResidencyRegistry) -> None:
    for replica in ("one", "two"):
        await registry.heartbeat(replica, 30)
    await registry.publish("one", "p", "loading")
    await registry.publish("one", "p", "resident")
    await registry.publish("two", "p", "host")
    await registry.publish("two", "q", "host")
    assert await registry.holders("p") == {"one": "resident", "two": "host"}
    assert await registry.programs("two") == {"p": "host", "q": "host"}
    await registry.publish("two", "p", "stored")
    assert await registry.holders("p") == {"one": "resident"}
    assert await registry.holders("unknown") == {}
    assert await registry.programs("unknown") == {}


async def test_a_replica_without_a_lease_is_not_seen(registry: ResidencyRegistry) -> None:
    await registry.heartbeat("one", 0.5)
    await registry.publish("one", "p", "host")
    assert await registry.holders("p") == {"one": "host"}
    await asyncio.sleep(0.6)
    assert await registry.holders("p") == {}
    assert await registry.programs("one") == {}


async def test_a_lost_lease_starts_with_nothing(registry: ResidencyRegistry) -> None:
    await registry.heartbeat("one", 0.05)
    await registry.publish("one", "p", "host")
    await asyncio.sleep(0.1)
    await registry.heartbeat("one", 30)
    assert await registry.holders("p") == {}


async def test_leaving_takes_everything_along(registry: ResidencyRegistry) -> None:
    await registry.heartbeat("one", 30)
    await registry.publish("one", "p", "host")
    await registry.forget("one")
    assert await registry.holders("p") == {}
    await registry.heartbeat("one", 30)
    assert await registry.programs("one") == {}


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
async def test_transitions(registry: ResidencyRegistry, before: str, after: str) -> None:
    await registry.heartbeat("one", 30)
    for state in {"stored": [], "draining": ["resident", "draining"]}.get(before, [before]):
        await registry.publish("one", "p", state)
    if after == before or after in TRANSITIONS[before]:
        await registry.publish("one", "p", after)
        assert await registry.programs("one") == ({} if after == "stored" else {"p": after})
    else:
        with pytest.raises(IllegalTransition, match=before):
            await registry.publish("one", "p", after)


async def test_unknown_states_are_refused(registry: ResidencyRegistry) -> None:
    with pytest.raises(IllegalTransition, match="not a state"):
        await registry.publish("one", "p", "lost")


async def test_concurrent_publishing_ends_consistent(registry: ResidencyRegistry) -> None:
    await registry.heartbeat("one", 30)
    await asyncio.gather(*(registry.publish("one", f"p{index}", "host") for index in range(50)))
    assert len(await registry.programs("one")) == 50


async def test_a_dead_redis_is_unavailable_quickly(tmp_path: Path) -> None:
    registry = RedisResidency(f"unix://{tmp_path / 'nobody.sock'}")
    calls: list[Callable[[], object]] = [
        lambda: registry.heartbeat("one", 1),
        lambda: registry.publish("one", "p", "host"),
        lambda: registry.holders("p"),
        lambda: registry.programs("one"),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable):
            await asyncio.wait_for(call(), 1.0)  # type: ignore[arg-type]
    await registry.close()
