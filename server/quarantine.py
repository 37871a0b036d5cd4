"""Programs that failed a tenant several times in a row, and are refused at once until the tenant does something about them. In memory: a
restart forgets it. It knows program ids and digests, no names.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

FAILURES = 3
"""Failures in a row that put a program into quarantine."""
CAUSES = frozenset({"adapter_load_failed", "non_finite_output"})
"""Error codes that speak of the adapter, not of the request or the server."""
MAX_PROGRAMS = 256
"""Programs of a tenant whose failures are remembered; the longest without a failure is forgotten first."""


@dataclass(slots=True)
class Record:
    """A program's failures in a row. ``code`` is the last one's, ``at`` its time in seconds since the epoch."""

    digests: tuple[str, ...]
    failures: int = 0
    code: str = ""
    at: float = 0.0
    last: float = float("-inf")
    """When the last failure was counted, on the clock of ``started``."""

    @property
    def is_closed(self) -> bool:
        return self.failures >= FAILURES


class Quarantine:
    """Per tenant and program: others who use the same bytes are not affected. For one event loop."""

    def __init__(self) -> None:
        self._tenants: dict[str, OrderedDict[str, Record]] = {}

    def __len__(self) -> int:
        """Programs in quarantine, over all tenants."""
        return sum(record.is_closed for records in self._tenants.values() for record in records.values())

    def refusal(self, tenant: str, program_id: str) -> Record | None:
        """Why the program is refused to the tenant; None: it is not."""
        records = self._tenants.get(tenant)
        record = None if records is None else records.get(program_id)
        return record if record is not None and record.is_closed else None

    def failed(self, tenant: str, program_id: str, digests: tuple[str, ...], code: str, started: float) -> None:
        """A request failed that was ``started`` then (monotonic, s). Codes that do not speak of the adapter are not counted, nor is a request
        that ran beside one already counted: a load that failed fails all who waited for it, and is one failure."""
        if code not in CAUSES:
            return
        records = self._tenants.setdefault(tenant, OrderedDict())
        record = records.setdefault(program_id, Record(digests))
        if started <= record.last:
            return
        record.failures += 1
        record.code, record.at, record.last = code, time.time(), time.monotonic()
        records.move_to_end(program_id)
        if len(records) > MAX_PROGRAMS:
            records.popitem(last=False)

    def succeeded(self, tenant: str, program_id: str) -> None:
        """A request ended well: what failed before it is not in a row any more. A quarantine stays, whoever still ran then."""
        if self.refusal(tenant, program_id) is None:
            self._remove(tenant, program_id)

    def release(self, tenant: str, digest: str) -> int:
        """Give everything made of an adapter another chance. Returns how many programs were in quarantine."""
        records = self._tenants.get(tenant, OrderedDict())
        found = [name for name, record in records.items() if digest in record.digests]
        closed = [name for name in found if self.refusal(tenant, name) is not None]
        for name in found:
            self._remove(tenant, name)
        return len(closed)

    def _remove(self, tenant: str, program_id: str) -> None:
        records = self._tenants.get(tenant)
        if records is not None and records.pop(program_id, None) is not None and not records:
            del self._tenants[tenant]
