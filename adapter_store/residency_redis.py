"""The residency registry in Redis: one Lua call per transition, the server's own time, leases that expire.

    medley:{res}:replicas         set of replicas, dead ones among them until somebody looks
    medley:{res}:replica:<name>   hash program id → state, and "" for the lease itself; expires with the lease
    medley:{res}:messages         channel between replicas

An entry cannot outlive its lease, because it is part of it. All keys share one hash tag, so that every script stays within one slot of a
cluster.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from typing import Any, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from adapter_store.errors import StoreUnavailable
from adapter_store.residency import LOST, TRANSITIONS, LeaseExpired, Message, check_state, illegal

_PREFIX = "medley:{res}:"
REPLICAS = _PREFIX + "replicas"
REPLICA = _PREFIX + "replica:"
CHANNEL = _PREFIX + "messages"
MAX_CONNECTIONS = 16
_RECONNECT_S = (0.05, 1.0)
"""How long to wait before a subscription is tried again: at first, and at most."""
_QUIET_S = 1.0
"""A subscription that has been silent for so long is asked for a sign of life."""

# KEYS: replica hash, replicas. ARGV: ttl in ms, replica, then program, state, program, state, …
_ENTER = """
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[1], '', '1')
for i = 3, #ARGV, 2 do redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1]) end
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('SADD', KEYS[2], ARGV[2])
return 1
"""
# KEYS: replica hash, replicas. ARGV: ttl in ms, replica. Returns whether there was a lease.
_HEARTBEAT = """
local lasted = redis.call('EXISTS', KEYS[1])
redis.call('HSET', KEYS[1], '', '1')
redis.call('PEXPIRE', KEYS[1], ARGV[1])
redis.call('SADD', KEYS[2], ARGV[2])
return lasted
"""
# KEYS: replica hash. ARGV: program, wanted state, then "from>to" pairs that are allowed. Returns '' or what stands against it.
_PUBLISH = """
if redis.call('EXISTS', KEYS[1]) == 0 then return 'expired' end
local current = redis.call('HGET', KEYS[1], ARGV[1]) or 'stored'
if current ~= ARGV[2] then
  local allowed = false
  for i = 3, #ARGV do
    if ARGV[i] == current .. '>' .. ARGV[2] then allowed = true end
  end
  if not allowed then return current end
end
if ARGV[2] == 'stored' then redis.call('HDEL', KEYS[1], ARGV[1]) else redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
return ''
"""
# KEYS: replicas. ARGV: replica hash prefix, program or ''. Returns replica, ms left of the lease, [program, state, …] for each.
_READ = """
local found = {}
for _, replica in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local left = redis.call('PTTL', ARGV[1] .. replica)
  if left < 0 then
    redis.call('SREM', KEYS[1], replica)
  else
    local entries = {}
    if ARGV[2] == '' then
      entries = redis.call('HGETALL', ARGV[1] .. replica)
    else
      local state = redis.call('HGET', ARGV[1] .. replica, ARGV[2])
      if state then entries = {ARGV[2], state} end
    end
    found[#found + 1] = {replica, left, entries}
  end
end
return found
"""
_EDGES = tuple(f"{before}>{after}" for before, afters in TRANSITIONS.items() for after in sorted(afters))


class RedisResidency:
    """The registry of several replicas. Raises StoreUnavailable within twice ``timeout_s`` (s) when Redis does not answer."""

    def __init__(self, url: str, *, timeout_s: float = 0.25) -> None:
        self._timeout_s = timeout_s
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MAX_CONNECTIONS,
            timeout=timeout_s,
            decode_responses=True,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        self._redis: Redis = Redis.from_pool(pool)
        self._enter = self._redis.register_script(_ENTER)
        self._heartbeat = self._redis.register_script(_HEARTBEAT)
        self._publish = self._redis.register_script(_PUBLISH)
        self._read = self._redis.register_script(_READ)

    async def enter(self, replica: str, ttl_s: float, programs: Mapping[str, str]) -> None:
        for state in programs.values():
            check_state(state)
        flat = [text for program, state in programs.items() if state != "stored" for text in (program, state)]
        await self._reach(self._enter([REPLICA + replica, REPLICAS], [_milliseconds(ttl_s), replica, *flat]))

    async def heartbeat(self, replica: str, ttl_s: float) -> bool:
        return bool(await self._reach(self._heartbeat([REPLICA + replica, REPLICAS], [_milliseconds(ttl_s), replica])))

    async def publish(self, replica: str, program_id: str, state: str) -> None:
        check_state(state)
        against = await self._reach(self._publish([REPLICA + replica], [program_id, state, *_EDGES]))
        if against == "expired":
            raise LeaseExpired(f"replica {replica} has no lease")
        if against:
            raise illegal(against, state)

    async def holders(self, program_id: str) -> dict[str, str]:
        found = await self._reach(self._read([REPLICAS], [REPLICA, program_id]))
        return {replica: entries[1] for replica, _, entries in found if entries}

    async def programs(self, replica: str) -> dict[str, str]:
        return _states(await self._reach(cast("Awaitable[Any]", self._redis.hgetall(REPLICA + replica))))

    async def replicas(self) -> dict[str, dict[str, str]]:
        found = await self._reach(self._read([REPLICAS], [REPLICA, ""]))
        return {replica: _states(dict(zip(flat[::2], flat[1::2], strict=True))) for replica, _, flat in found}

    async def leases(self) -> dict[str, float]:
        # No program has this id: only the leases are wanted.
        found = await self._reach(self._read([REPLICAS], [REPLICA, "-"]))
        return {replica: left / 1000 for replica, left, _ in found}

    async def forget(self, replica: str) -> None:
        await self._reach(cast("Awaitable[Any]", self._redis.delete(REPLICA + replica)))

    async def announce(self, message: Message) -> None:
        await self._reach(cast("Awaitable[Any]", self._redis.publish(CHANNEL, json.dumps(message))))

    async def messages(self) -> AsyncGenerator[Message, None]:
        first, longest = _RECONNECT_S
        pause = first
        while True:
            try:
                async with self._redis.pubsub() as channel:
                    await channel.subscribe(CHANNEL)
                    async with aclosing(self._received(channel)) as received:
                        async for message in received:
                            pause = first
                            yield message
            except (RedisError, OSError):
                # All replicas lost it at the same time; they need not come back at the same time.
                await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
                pause = min(pause * 2, longest)

    async def close(self) -> None:
        await self._redis.aclose()

    async def _received(self, channel: PubSub) -> AsyncGenerator[Message, None]:
        """What comes out of a subscription, until it breaks or is silent when asked. Each confirmation of it means that others were missed."""
        is_asked = False
        while True:
            received = await channel.get_message(timeout=self._timeout_s if is_asked else _QUIET_S)
            if received is None:
                if is_asked:
                    raise ConnectionError("the subscription is silent")
                await channel.ping()
            is_asked = received is None
            if received is not None and received["type"] == "subscribe":
                yield LOST
            elif received is not None and received["type"] == "message":
                yield _message(received["data"])

    async def _reach(self, call: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(2 * self._timeout_s):
                return await call
        except (RedisError, OSError) as error:
            raise StoreUnavailable("the residency registry (Redis) does not answer") from error


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def _states(entries: Mapping[str, str]) -> dict[str, str]:
    return {program: state for program, state in entries.items() if program}


def _message(text: str) -> Message:
    """A message as it was announced; one that cannot be read is as good as lost."""
    try:
        message = json.loads(text)
    except ValueError:
        return LOST
    return message if isinstance(message, dict) else LOST
