"""Pinned adapters: on the device whatever else comes. The catalog knows which; this keeps the engine to it.

All pins together take at most a part of the bank, so that there is room for everybody else.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import ExitStack
from functools import partial

from adapter_store.errors import PinLimit, StoreError
from adapter_store.store import Store
from adapter_store.types import AdapterVersion
from server.adapters.faults import LoweringError
from server.adapters.lowerer import LoweredProgram, LowererClient
from server.adapters.turns import TooManyWaiting
from server.engine.client import EngineClient
from server.engine.types import ProgramRef

log = logging.getLogger(__name__)


class Pins:
    """``limit_bytes``: what pinned programs may take on the device."""

    def __init__(self, store: Store, lowerer: LowererClient, engine: EngineClient, limit_bytes: int) -> None:
        self._store = store
        self._lowerer = lowerer
        self._engine = engine
        self._limit_bytes = limit_bytes
        self._held: dict[str, tuple[int, ExitStack]] = {}
        self._changing = asyncio.Lock()

    @property
    def nbytes(self) -> int:
        """What the pinned programs take on the device."""
        return sum(nbytes for nbytes, _ in self._held.values())

    async def pin(self, version: AdapterVersion) -> None:
        """Keep a version of a tenant's on the device. Raises PinLimit, and what lowering raises."""
        async with self._changing:
            await self._hold(version, within=self._limit_bytes)
            await asyncio.to_thread(self._store.pin, version.tenant, version.digest)

    async def unpin(self, version: AdapterVersion) -> None:
        """Let it go like others. That it was not pinned is no error."""
        await asyncio.to_thread(self._store.unpin, version.tenant, version.digest)
        await self.sync()

    async def sync(self) -> None:
        """Do what the catalog says: after a start, a delete, or a change on another replica. Raises StoreError."""
        async with self._changing:
            wanted = {version.digest: version for version in await asyncio.to_thread(self._store.pinned_versions)}
            for digest in self._held.keys() - wanted.keys():
                _, held = self._held.pop(digest)
                await self._engine.unpin_program(self._lowerer.program_id(digest))
                held.close()
            for digest in wanted.keys() - self._held.keys():
                try:
                    await self._hold(wanted[digest], within=None)
                except (StoreError, LoweringError, TooManyWaiting) as error:
                    log.warning("a pinned adapter (%s) cannot be loaded: %s", digest[:19], error)

    async def _hold(self, version: AdapterVersion, within: int | None) -> None:
        if version.digest in self._held:
            return
        with ExitStack() as stack:
            stack.enter_context(self._lowerer.using(((version.digest, 1.0),)))
            program = await self._lowerer.ensure(version.tenant, version.digest, partial(self._store.checkout, version))
            nbytes = int(program.facts["program_bytes"])
            if within is not None and self.nbytes + nbytes > within:
                message = f"{self.nbytes} of the {within} bytes for pinned adapters are taken, and this one has {nbytes}; unpin another first"
                raise PinLimit(message)
            await self._engine.pin_program(program_ref(program))
            self._held[version.digest] = (nbytes, stack.pop_all())


def program_ref(program: LoweredProgram) -> ProgramRef:
    """A lowered program, as the engine is told of it."""
    return ProgramRef(program.program_id, str(program.path), program.facts.get("room_taken", 0))
