"""The residency registry in Redis: one Lua call per transition, the server's own time, leases that expire.

    medley:{res}:lease:<replica>   string with a TTL: the replica is alive
    medley:{res}:by:<replica>      hash program id → state
    medley:{res}:of:<program id>   set of replicas that have an entry for it

All keys share one hash tag, so that every script stays within one slot of a cluster.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from adapter_store.errors import StoreUnavailable
from adapter_store.residency import TRANSITIONS, IllegalTransition, check_transition

_PREFIX = "medley:{res}:"
LEASE = _PREFIX + "lease:"
BY_REPLICA = _PREFIX + "by:"
OF_PROGRAM = _PREFIX + "of:"

# KEYS: by-replica hash, of-program set. ARGV: program, replica, wanted state, then "from>to" pairs that are allowed.
_PUBLISH = """
local current = redis.call('HGET', KEYS[1], ARGV[1]) or 'stored'
if current ~= ARGV[3] then
  local allowed = false
  for i = 4, #ARGV do
    if ARGV[i] == current .. '>' .. ARGV[3] then allowed = true end
  end
  if not allowed then return redis.error_reply('ILLEGAL ' .. current) end
end
if ARGV[3] == 'stored' then
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('SREM', KEYS[2], ARGV[2])
else
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[3])
  redis.call('SADD', KEYS[2], ARGV[2])
end
return 1
"""
# KEYS: lease, by-replica hash. ARGV: ttl in ms, replica, of-program prefix, whether to take the lease.
_RENEW = """
if ARGV[4] == '0' or redis.call('EXISTS', KEYS[1]) == 0 then
  for _, program in ipairs(redis.call('HKEYS', KEYS[2])) do
    redis.call('SREM', ARGV[3] .. program, ARGV[2])
  end
  redis.call('DEL', KEYS[2])
end
if ARGV[4] == '0' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], '1', 'PX', ARGV[1]) end
return 1
"""
# KEYS: of-program set. ARGV: program, lease prefix, by-replica prefix. Returns replica, state, replica, state, …
_HOLDERS = """
local found = {}
for _, replica in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  if redis.call('EXISTS', ARGV[2] .. replica) == 1 then
    local state = redis.call('HGET', ARGV[3] .. replica, ARGV[1])
    if state then
      found[#found + 1] = replica
      found[#found + 1] = state
    end
  end
end
return found
"""
_EDGES = tuple(f"{before}>{after}" for before, afters in TRANSITIONS.items() for after in sorted(afters))


class RedisResidency:
    """The registry of several replicas. Raises StoreUnavailable quickly when Redis does not answer."""

    def __init__(self, url: str, *, timeout_s: float = 0.25) -> None:
        self._redis: Redis = Redis.from_url(
            url, decode_responses=True, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=Retry(NoBackoff(), 0)
        )
        self._publish = self._redis.register_script(_PUBLISH)
        self._renew = self._redis.register_script(_RENEW)
        self._holders = self._redis.register_script(_HOLDERS)

    async def heartbeat(self, replica: str, ttl_s: float) -> None:
        await _reach(self._renew([LEASE + replica, BY_REPLICA + replica], [int(ttl_s * 1000), replica, OF_PROGRAM, "1"]))

    async def publish(self, replica: str, program_id: str, state: str, nbytes: int = 0) -> None:
        check_transition(state, state)
        try:
            await _reach(self._publish([BY_REPLICA + replica, OF_PROGRAM + program_id], [program_id, replica, state, *_EDGES]))
        except ResponseError as error:
            current = str(error).removeprefix("ILLEGAL ")
            raise IllegalTransition(f"a program that is {current} cannot become {state}") from error

    async def holders(self, program_id: str) -> dict[str, str]:
        flat = await _reach(self._holders([OF_PROGRAM + program_id], [program_id, LEASE, BY_REPLICA]))
        return dict(zip(flat[::2], flat[1::2], strict=True))

    async def programs(self, replica: str) -> dict[str, str]:
        if not await _reach(self._redis.exists(LEASE + replica)):
            return {}
        return cast("dict[str, str]", await _reach(cast("Awaitable[Any]", self._redis.hgetall(BY_REPLICA + replica))))

    async def forget(self, replica: str) -> None:
        await _reach(self._renew([LEASE + replica, BY_REPLICA + replica], [0, replica, OF_PROGRAM, "0"]))

    async def close(self) -> None:
        await self._redis.aclose()


async def _reach(call: Awaitable[Any]) -> Any:
    try:
        return await call
    except ResponseError:
        raise
    except (RedisError, OSError) as error:
        raise StoreUnavailable("the residency registry (Redis) does not answer") from error
