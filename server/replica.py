"""This server among its replicas: it publishes what its engine holds, and follows what the others announce. A registry that does not answer
makes the server degraded, never wrong: no request waits for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Collection
from contextlib import aclosing

from adapter_store.errors import StoreError, StoreUnavailable
from adapter_store.residency import LOST, Message, ResidencyRegistry
from adapter_store.store import Store
from server.adapters.lowerer import LowererClient
from server.background import Background
from server.engine.client import EngineClient, EngineUnavailable
from server.pins import Pins
from server.quarantine import Quarantine
from server.residents import Residents

LEASE_S = 10.0
HEARTBEAT_S = 2.0
LOOK_S = 0.1
"""How often changes are looked for: what comes within is told together."""
RETRY_S = 0.5
"""How long a registry that does not answer is left alone."""
MAX_UNSAID = 1024
"""Announcements that wait for the registry. Beyond it the oldest go: what others then keep, they keep until it is evicted."""

PINS_CHANGED: Message = {"kind": "pins"}
"""The announcement that the catalog's pins are not what they were."""

log = logging.getLogger(__name__)


def deleted(digests: list[str]) -> Message:
    """The announcement that adapters were deleted. Others may still have the same bytes: each replica asks the store."""
    return {"kind": "deleted", "digests": digests}


def released(tenant: str, digest: str) -> Message:
    """The announcement that a tenant wants an adapter tried again that was in quarantine."""
    return {"kind": "released", "tenant": tenant, "digest": digest}


class Replica:
    """``name`` is unique among the replicas. ``is_degraded``: the registry did not answer when it was last asked."""

    def __init__(
        self,
        name: str,
        registry: ResidencyRegistry,
        residents: Residents,
        store: Store,
        lowerer: LowererClient,
        engine: EngineClient,
        pins: Pins,
        quarantine: Quarantine,
    ) -> None:
        self.name = name
        self.is_degraded = False
        self._registry = registry
        self._residents = residents
        self._store = store
        self._lowerer = lowerer
        self._engine = engine
        self._pins = pins
        self._quarantine = quarantine
        self._background = Background()
        self._unsaid: deque[Message] = deque(maxlen=MAX_UNSAID)
        self._is_entered = False
        self._beat = 0.0

    def announce(self, message: Message) -> None:
        """Tell all replicas as soon as the registry answers; nobody waits for it."""
        self._unsaid.append(message)

    async def publish(self) -> None:
        """Keep the registry up to date, until cancelled; then leave it."""
        try:
            while True:
                await asyncio.sleep(RETRY_S if self.is_degraded else LOOK_S)
                try:
                    await self._tell()
                except StoreUnavailable as error:
                    self._is_entered = False
                    self._degrade(str(error))
                except StoreError as error:
                    # What the registry knows and what was told do not fit: it is told everything.
                    self._is_entered = False
                    log.warning("the residency registry is told everything again: %s", error)
                else:
                    self._degrade("")
        finally:
            with contextlib.suppress(StoreError):
                await self._registry.forget(self.name)

    async def follow(self) -> None:
        """Do what the others' announcements ask for, until cancelled."""
        async with aclosing(self._registry.messages()) as messages:
            async for message in messages:
                try:
                    await self._heed(message)
                except (StoreError, EngineUnavailable, OSError) as error:
                    log.warning("what other replicas changed is not followed now: %s", error)

    async def delete(self, digests: list[str]) -> None:
        """Adapters were deleted here: free what nobody has any more, on all replicas."""
        self.announce(deleted(digests))
        await self._drop_deleted(digests)

    def release(self, tenant: str, digest: str) -> None:
        """Give what a tenant made of an adapter another chance, on all replicas."""
        self._quarantine.release(tenant, digest)
        self.announce(released(tenant, digest))

    def tell_pins(self) -> None:
        """Pins were changed here: have the other replicas look."""
        self.announce(PINS_CHANGED)

    async def _tell(self) -> None:
        """Publish what changed, or everything; say what is to be announced; and stay alive."""
        await self._publish_states()
        while self._unsaid:
            await self._registry.announce(self._unsaid[0])
            self._unsaid.popleft()

    async def _publish_states(self) -> None:
        changes = self._residents.take_changes()
        if not self._is_entered or changes is None:
            await self._registry.enter(self.name, LEASE_S, self._residents.states())
            self._is_entered, self._beat = True, time.monotonic()
            return
        if time.monotonic() - self._beat >= HEARTBEAT_S:
            self._is_entered = await self._registry.heartbeat(self.name, LEASE_S)
            self._beat = time.monotonic()
            if not self._is_entered:
                return
        for program_id, state in changes:
            await self._registry.publish(self.name, program_id, state.value)

    async def _heed(self, message: Message) -> None:
        if message in (LOST, PINS_CHANGED):
            await self._pins.sync()
        if message == LOST:
            await self._drop_deleted({digest for item in self._residents for digest in item.digests})
        elif message.get("kind") == "released":
            self._quarantine.release(str(message.get("tenant")), str(message.get("digest")))
        elif message.get("kind") == "deleted":
            await self._drop_deleted(message.get("digests") or [])

    async def _drop_deleted(self, digests: Collection[str]) -> None:
        """Free the programs of adapters that no tenant has any more. The same files may be somebody else's, or have another name."""
        if any(digest in self._pins for digest in digests):
            # Somebody's pin may be under way, which can take long.
            self._background.start(self._pins.sync())
        for digest in sorted(await asyncio.to_thread(self._store.absent, digests)):
            for program_id in self._lowerer.forget(digest):
                await self._engine.drop_program(program_id)

    def _degrade(self, reason: str) -> None:
        if reason and not self.is_degraded:
            log.warning("%s; serving goes on without it", reason)
        elif self.is_degraded and not reason:
            log.info("the residency registry answers again")
        self.is_degraded = bool(reason)
