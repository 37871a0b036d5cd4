"""What a server does beside its requests, now and then: write down what was used, and sweep the store."""

from __future__ import annotations

import asyncio
import logging
import time

from adapter_store.errors import StoreError
from adapter_store.store import Store
from server.engine.client import EngineUnavailable
from server.last_used import LastUsed
from server.pins import Pins

FLUSH_S = 10.0
SWEEP_S = 600.0

log = logging.getLogger(__name__)


async def maintain(store: Store, last_used: LastUsed, pins: Pins) -> None:
    """Until it is cancelled; then once more what was used. A store that does not answer is asked again the next time."""
    swept = time.monotonic()
    try:
        while True:
            await asyncio.sleep(FLUSH_S)
            try:
                await last_used.flush()
                if time.monotonic() - swept >= SWEEP_S:
                    swept = time.monotonic()
                    # What the engine refused for want of room may have it now.
                    await pins.sync()
                    gone = await asyncio.to_thread(store.sweep)
                    log.info("swept %d blobs and %d uploads that nobody needs", gone.blobs, gone.uploads)
            except (StoreError, EngineUnavailable, OSError) as error:
                log.warning("the store cannot be kept in order now: %s", error)
    finally:
        try:
            await last_used.flush()
        except StoreError as error:
            log.warning("what was used last could not be written down: %s", error)
