"""Pinned adapters: on the device whatever else comes. The catalog knows which; this keeps the engine to it.

All pins together take at most a part of the bank, so that there is room for everybody else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import ExitStack
from functools import partial

from adapter_store.errors import PinLimit
from adapter_store.store import Store
from adapter_store.types import AdapterVersion
from server.adapters.lowerer import LowererClient
from server.engine.client import EngineClient
from server.errors import ADAPTER_ERRORS
from server.program_ref import program_ref

log = logging.getLogger(__name__)


class Pins:
    """For one event loop."""

    def __init__(self, store: Store, lowerer: LowererClient, engine: EngineClient) -> None:
        self._store = store
        self._lowerer = lowerer
        self._engine = engine
        # By digest: bytes on the device, and what keeps the program's file.
        self._held: dict[str, tuple[int, ExitStack]] = {}
        self._changing = asyncio.Lock()

    def __contains__(self, digest: str) -> bool:
        """Whether somebody pinned an adapter."""
        return digest in self._held

    async def pin(self, version: AdapterVersion) -> None:
        """Keep a version of a tenant's on the device. Raises PinLimit, AdapterNotFound, and what lowering raises."""
        async with self._changing:
            since = time.monotonic()
            is_new = await asyncio.to_thread(self._store.pin, version.tenant, version.digest)
            try:
                await self._hold(version, since)
            except BaseException:
                if is_new:
                    await asyncio.to_thread(self._store.unpin, version.tenant, version.digest)
                raise

    async def unpin(self, version: AdapterVersion) -> None:
        """Let it go like others. That it was not pinned is no error."""
        await asyncio.to_thread(self._store.unpin, version.tenant, version.digest)
        await self.sync()

    async def sync(self) -> None:
        """Do what the catalog says: after a start, a delete, or a change on another replica. Raises StoreError."""
        async with self._changing:
            since = time.monotonic()
            wanted = {version.digest: version for version in await asyncio.to_thread(self._store.pinned_versions)}
            for digest in self._held.keys() - wanted.keys():
                _, held = self._held.pop(digest)
                await self._engine.unpin_program(self._lowerer.program_id(digest))
                held.close()
            for digest in wanted.keys() - self._held.keys():
                try:
                    await self._hold(wanted[digest], since)
                except ADAPTER_ERRORS as error:
                    log.warning("a pinned adapter (%s) cannot be loaded: %s", digest[:19], error)

    def refused(self, program_id: str) -> None:
        """The engine does not keep a program after all: it could not be loaded, or is larger there than was known. ``sync`` tries again."""
        for digest in [digest for digest in self._held if self._lowerer.program_id(digest) == program_id]:
            _, held = self._held.pop(digest)
            held.close()
            log.warning("the engine does not keep a pinned adapter (%s)", digest[:19])

    async def _hold(self, version: AdapterVersion, since: float) -> None:
        if version.digest in self._held:
            return
        with ExitStack() as stack:
            stack.enter_context(self._lowerer.using(((version.digest, 1.0),), since=since))
            program = await self._lowerer.ensure(version.tenant, version.digest, partial(self._store.checkout, version))
            nbytes = int(program.facts["program_bytes"])
            sizes = [size for size, _ in self._held.values()]
            if not self._engine.pins_fit([*sizes, nbytes]):
                raise PinLimit(f"there is no room for {nbytes} bytes more of pinned adapters; unpin another first")
            await self._engine.pin_program(program_ref(program))
            self._held[version.digest] = (nbytes, stack.pop_all())
