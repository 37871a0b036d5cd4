"""When which adapter was last used: noted at every request, written down now and then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable

from adapter_store.errors import StoreError
from adapter_store.store import Store
from adapter_store.types import AdapterVersion


class LastUsed:
    """What was used since the last ``flush``. A crash loses that much and no more."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._noted: dict[tuple[str, str, int], float] = {}

    def note(self, versions: Iterable[AdapterVersion]) -> None:
        """These are being used now."""
        now = time.time()
        for version in versions:
            self._noted[version.tenant, version.name, version.number] = now

    def of(self, version: AdapterVersion) -> float | None:
        """Seconds since the epoch; None: never."""
        noted = self._noted.get((version.tenant, version.name, version.number), version.created)
        # What was noted before it was made speaks of a deleted version, whose number it has.
        return noted if noted > version.created else version.last_used

    async def flush(self) -> None:
        """Write down what was noted. What cannot be written is kept for the next time. Raises StoreError."""
        noted, self._noted = self._noted, {}
        if not noted:
            return
        try:
            await asyncio.to_thread(self._store.touch, noted)
        except StoreError:
            self._noted = noted | self._noted
            raise
