"""One conformance suite for the registry in this process and for the one in a real Redis (Valkey) server."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis

from adapter_store.errors import StoreUnavailable
from adapter_store.residency import (
    LOST,
    MAX_UNREAD,
    STATES,
    TRANSITIONS,
    IllegalTransition,
    LeaseExpired,
    LocalResidency,
    ResidencyRegistry,
)
from adapter_store.residency_redis import CHANNEL, MAX_CONNECTIONS, REPLICA, RedisResidency
from tests.redis import running_redis, start_redis

PATIENT_S = 5.0
"""Where slowness is not what is tested, a busy machine is no failure."""
BUSY_S = 10.0
"""What must not wait for an answer that never comes may still have to wait for a busy machine."""
Calls = list[Callable[[], Awaitable[Any]]]


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_redis(tmp_path_factory.mktemp("valkey")) as (url, _):
        yield url


@pytest.fixture(params=["local", "redis"])
async def registry(request: pytest.FixtureRequest) -> AsyncIterator[ResidencyRegistry]:
    made: ResidencyRegistry = (
        LocalResidency()
        if request.param == "local"
        else RedisResidency(request.getfixturevalue("redis_url"), timeout_s=PATIENT_S)
    )
    yield made
    for replica in await made.replicas():
        await made.forget(replica)
    await made.close()


def every_call(registry: ResidencyRegistry) -> Calls:
    return [
        lambda: registry.enter("one", 1, {}),
        lambda: registry.heartbeat("one", 1),
        lambda: registry.publish("one", "p", "host"),
        lambda: registry.holders("p"),
        lambda: registry.programs("one"),
        registry.replicas,
        registry.leases,
        lambda: registry.forget("one"),
        lambda: registry.announce({"kind": "x"}),
    ]


async def answered(call: Callable[[], Awaitable[Any]]) -> Any:
    """What a call gives in the end, where patience is short and the machine may be busy."""
    while True:
        try:
            return await call()
        except StoreUnavailable:
            await asyncio.sleep(0.05)


async def test_holders_and_programs(registry: ResidencyRegistry) -> None:
    for replica in ("one", "two"):
        assert not await registry.heartbeat(replica, 30)
    await registry.publish("one", "p", "loading")
    await registry.publish("one", "p", "resident")
    await registry.publish("two", "p", "host")
    await registry.publish("two", "q", "host")
    assert await registry.heartbeat("two", 30)
    assert await registry.holders("p") == {"one": "resident", "two": "host"}
    assert await registry.programs("two") == {"p": "host", "q": "host"}
    assert await registry.replicas() == {"one": {"p": "resident"}, "two": {"p": "host", "q": "host"}}
    await registry.publish("two", "p", "stored")
    assert await registry.holders("p") == {"one": "resident"}
    assert await registry.holders("unknown") == {}
    assert await registry.programs("unknown") == {}


async def test_leases_say_how_long_they_last(registry: ResidencyRegistry) -> None:
    await registry.heartbeat("one", 30)
    await registry.enter("two", 10, {})
    leases = await registry.leases()
    assert 20 < leases["one"] <= 30
    assert 0 < leases["two"] <= 10


async def lose_lease(registry: ResidencyRegistry, replica: str) -> None:
    """Have a replica's lease end."""
    assert await registry.heartbeat(replica, 0.01)
    while await registry.leases():
        await asyncio.sleep(0.01)


async def test_a_replica_without_a_lease_is_not_seen(registry: ResidencyRegistry) -> None:
    await registry.heartbeat("one", 30)
    await registry.publish("one", "p", "host")
    assert await registry.holders("p") == {"one": "host"}
    await lose_lease(registry, "one")
    assert await registry.holders("p") == {}
    assert await registry.programs("one") == {}
    assert await registry.replicas() == {}
    assert await registry.leases() == {}


async def test_a_lost_lease_starts_with_nothing(registry: ResidencyRegistry) -> None:
    await registry.heartbeat("one", 30)
    await registry.publish("one", "p", "host")
    await lose_lease(registry, "one")
    with pytest.raises(LeaseExpired):
        await registry.publish("one", "q", "host")
    assert not await registry.heartbeat("one", 30)
    assert await registry.replicas() == {"one": {}}


async def test_heartbeats_keep_entries(registry: ResidencyRegistry) -> None:
    await registry.enter("one", 1, {"p": "host"})
    for _ in range(2):
        assert await registry.heartbeat("one", 30)
    await asyncio.sleep(1.05)
    assert await registry.programs("one") == {"p": "host"}


async def test_entering_replaces_everything(registry: ResidencyRegistry) -> None:
    await registry.heartbeat("one", 30)
    await registry.publish("one", "p", "host")
    many = {f"p{index}": "host" for index in range(5000)}
    await registry.enter("one", 30, {**many, "q": "draining", "gone": "stored"})
    assert await registry.programs("one") == {**many, "q": "draining"}
    with pytest.raises(IllegalTransition):
        await registry.enter("one", 30, {"p": "lost"})


async def test_leaving_takes_everything_along(registry: ResidencyRegistry) -> None:
    await registry.heartbeat("one", 30)
    await registry.publish("one", "p", "host")
    await registry.forget("one")
    assert await registry.holders("p") == {}
    assert not await registry.heartbeat("one", 30)
    assert await registry.programs("one") == {}


@pytest.mark.parametrize("before", STATES)
@pytest.mark.parametrize("after", STATES)
async def test_transitions(registry: ResidencyRegistry, before: str, after: str) -> None:
    await registry.enter("one", 30, {"p": before})
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


async def test_messages_reach_every_replica_the_own_one_included(registry: ResidencyRegistry) -> None:
    await registry.announce({"kind": "before anybody listened"})
    first, second = registry.messages(), registry.messages()
    assert [await anext(first), await anext(second)] == [LOST, LOST]
    sent = [{"kind": "deleted", "digests": [f"sha256:{index}"]} for index in range(20)]
    for message in sent:
        await registry.announce(message)
    for listener in (first, second):
        assert [await anext(listener) for _ in sent] == sent
        await listener.aclose()
    await registry.announce({"kind": "nobody listens any more"})
    with pytest.raises(TypeError):
        await registry.announce({"kind": object()})


async def test_a_subscriber_that_does_not_read_is_told_what_it_lost() -> None:
    registry = LocalResidency()
    listener = registry.messages()
    await anext(listener)
    for index in range(MAX_UNREAD + 1):
        await registry.announce({"kind": "x", "index": index})
    assert [await anext(listener), await anext(listener)] == [LOST, {"kind": "x", "index": MAX_UNREAD}]
    await listener.aclose()


async def test_a_dead_redis_is_unavailable_quickly(tmp_path: Path) -> None:
    registry = RedisResidency(f"unix://{tmp_path / 'nobody.sock'}")
    for call in every_call(registry):
        with pytest.raises(StoreUnavailable):
            await asyncio.wait_for(call(), BUSY_S)
    await registry.close()


async def test_a_stopped_redis_is_unavailable_quickly_and_nothing_piles_up(tmp_path: Path) -> None:
    with running_redis(tmp_path) as (url, process):
        registry = RedisResidency(url, timeout_s=0.1)
        await answered(lambda: registry.enter("one", 30, {"p": "host"}))
        tasks = len(asyncio.all_tasks())
        process.send_signal(signal.SIGSTOP)
        for call in every_call(registry):
            started = time.monotonic()
            with pytest.raises(StoreUnavailable):
                await call()
            assert time.monotonic() - started < BUSY_S
        started = time.monotonic()
        outcomes = await asyncio.gather(*(registry.holders("p") for _ in range(200)), return_exceptions=True)
        assert time.monotonic() - started < BUSY_S
        assert {type(outcome) for outcome in outcomes} == {StoreUnavailable}
        assert len(asyncio.all_tasks()) == tasks
        process.send_signal(signal.SIGCONT)
        # What it was asked while it slept it may do now, so that a replica says anew what it holds.
        await answered(lambda: registry.enter("one", 30, {"q": "host"}))
        assert await answered(registry.replicas) == {"one": {"q": "host"}}
        async with Redis.from_url(url) as redis:
            assert len(await redis.client_list()) <= MAX_CONNECTIONS + 1
        await registry.close()


async def test_a_flushed_redis_shows_at_the_next_heartbeat(redis_url: str) -> None:
    registry = RedisResidency(redis_url, timeout_s=PATIENT_S)
    await registry.enter("one", 30, {"p": "host"})
    async with Redis.from_url(redis_url) as redis:
        await redis.flushall()
    assert await registry.replicas() == {}
    with pytest.raises(LeaseExpired):
        await registry.publish("one", "q", "host")
    assert not await registry.heartbeat("one", 30)
    await registry.enter("one", 30, {"p": "host"})
    assert await registry.holders("p") == {"one": "host"}
    await registry.forget("one")
    await registry.close()


async def test_nothing_is_left_of_a_dead_replica(redis_url: str) -> None:
    registry = RedisResidency(redis_url, timeout_s=PATIENT_S)
    await registry.enter("one", 0.05, {"p": "host"})
    await asyncio.sleep(0.1)
    assert await registry.replicas() == {}
    async with Redis.from_url(redis_url) as redis:
        assert await redis.keys("medley:*") == []
    await registry.close()


@pytest.mark.parametrize("what", ["killed", "restarted", "stopped"])
async def test_an_interrupted_subscription_is_told_so(what: str, tmp_path: Path) -> None:
    url, process = start_redis(tmp_path)
    registry, teller = RedisResidency(url, timeout_s=0.1), RedisResidency(url, timeout_s=PATIENT_S)
    listener = registry.messages()
    try:
        assert await anext(listener) == LOST
        await teller.announce({"kind": "x"})
        assert await anext(listener) == {"kind": "x"}
        following = asyncio.create_task(anext(listener))
        await asyncio.sleep(0.05)
        if what == "killed":
            async with Redis.from_url(url) as redis:
                await redis.client_kill_filter(_type="pubsub")
        elif what == "restarted":
            process.kill()
            process.wait()
            await asyncio.sleep(0.3)
            url, process = start_redis(tmp_path)
        else:
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(1.6)
            process.send_signal(signal.SIGCONT)
        assert await asyncio.wait_for(following, 30) == LOST
        await teller.announce({"kind": "y"})
        # The stopped server may confirm each of the attempts that it slept through.
        assert await asyncio.wait_for(_after_lost(listener), 30) == {"kind": "y"}
    finally:
        await listener.aclose()
        await registry.close()
        await teller.close()
        process.kill()
        process.wait()


async def _after_lost(listener: AsyncIterator[Any]) -> Any:
    async for message in listener:
        if message != LOST:
            return message
    raise AssertionError("messages never end")


async def test_what_is_no_message_is_lost(redis_url: str) -> None:
    registry = RedisResidency(redis_url, timeout_s=PATIENT_S)
    listener = registry.messages()
    await anext(listener)
    async with Redis.from_url(redis_url) as redis:
        for text in ("{", "[1]", '{"kind": "x"}'):
            await redis.publish(CHANNEL, text)
    assert [await anext(listener) for _ in range(3)] == [LOST, LOST, {"kind": "x"}]
    await listener.aclose()
    await registry.close()


async def test_a_redis_that_refuses_is_unavailable(redis_url: str) -> None:
    registry = RedisResidency(redis_url, timeout_s=PATIENT_S)
    async with Redis.from_url(redis_url) as redis:
        await redis.set(REPLICA + "one", "not a hash")
        with pytest.raises(StoreUnavailable):
            await registry.heartbeat("one", 1)
        await redis.delete(REPLICA + "one")
    await registry.close()
