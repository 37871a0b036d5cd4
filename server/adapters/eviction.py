"""Which programs go when room is needed. Knows names, bytes, uses and tenants; not what a program is. Standard library only.

GDSF, greedy-dual-size-frequency (Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs
1998): the lowest ``L + frequency * cost / size`` goes first. ``L`` is the value of what went last, so that programs that were used
long ago fall behind new ones. ``cost`` is the time that bringing the program in again takes, in bytes copied meanwhile.

Over it stands a guarantee. The tenants that were active in the last ``window_s`` seconds share the room equally, in bytes and in number. What
a tenant used in that time is never taken for another tenant while its owner is within its share; what a tenant over its share or the
asking tenant itself used can be taken. A program that several tenants used counts for each of them in full.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field

WINDOW_S = 10.0
_FIXED_COST_BYTES = 1 << 20
"""Opening, parsing and laying out a program takes as long as copying about a megabyte."""


@dataclass(slots=True)
class _Entry:
    nbytes: int
    frequency: int
    value: float
    used_by: dict[str, float] = field(default_factory=dict)
    """Tenant → when it last used the program."""


@dataclass(slots=True)
class _Use:
    """What a tenant's recently used programs take."""

    nbytes: int = 0
    count: int = 0


class Eviction:
    """The policy over one tier of ``capacity_bytes`` and ``capacity_count`` programs. ``clock`` is in seconds.

    ``permanent`` are programs that an explicit pin keeps, in the tier or not: they never go, and what is left beside them is shared.
    """

    def __init__(
        self,
        capacity_bytes: int,
        capacity_count: int = sys.maxsize,
        *,
        window_s: float = WINDOW_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.permanent: set[str] = set()
        self._capacity_bytes = capacity_bytes
        self._capacity_count = capacity_count
        self._window_s = window_s
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._active: dict[str, float] = {}
        self._inflation = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def permanent_bytes(self) -> int:
        """What the permanent programs in the tier take."""
        return sum(self._entries[name].nbytes for name in self.permanent if name in self._entries)

    def add(self, name: str, nbytes: int) -> None:
        """A program has come into the tier."""
        self._entries[name] = _Entry(nbytes, 1, self._inflation + _worth(nbytes))

    def use(self, name: str, tenant: str) -> None:
        """A tenant's request uses a program of the tier: counted once a request."""
        entry = self._entries[name]
        entry.frequency += 1
        entry.value = self._inflation + entry.frequency * _worth(entry.nbytes)
        self.touch(name, tenant)

    def touch(self, name: str, tenant: str) -> None:
        """A use goes on, or ends now: it is recent, and not counted again."""
        self._active[tenant] = self._entries[name].used_by[tenant] = self._clock()

    def evict(self, name: str) -> None:
        """A program went because room was needed."""
        self._inflation = max(self._inflation, self._entries.pop(name).value)

    def remove(self, name: str) -> None:
        """A program went for another reason, which says nothing of the others."""
        del self._entries[name]

    def choose(
        self, tenant: str | None, nbytes: int, count: int, *, held: Container[str] = (), shares: bool = True
    ) -> list[str] | None:
        """The programs to evict for ``tenant`` so that ``nbytes`` and ``count`` places more are free; None: there are not enough.

        ``tenant`` None is nobody, who has no share. ``held`` programs are in use and stay; without ``shares`` only those and the permanent
        ones do. Changes nothing.
        """
        since = self._clock() - self._window_s
        usage, most = self._usage(since), self._share(tenant, since)
        chosen: list[str] = []
        for name, entry in sorted(self._entries.items(), key=lambda item: item[1].value):
            if nbytes <= 0 and count <= 0:
                break
            if name in held or name in self.permanent:
                continue
            owners = [owner for owner, used in entry.used_by.items() if used > since]
            if shares and any(owner != tenant and _is_within(usage[owner], most) for owner in owners):
                continue
            chosen.append(name)
            nbytes, count = nbytes - entry.nbytes, count - 1
            for owner in owners:
                usage[owner].nbytes -= entry.nbytes
                usage[owner].count -= 1
        return chosen if nbytes <= 0 and count <= 0 else None

    def is_within_share(self, tenant: str, nbytes: int) -> bool:
        """Whether a tenant stays within its share with one more program of ``nbytes``."""
        since = self._clock() - self._window_s
        use = self._usage(since).get(tenant, _Use())
        return _is_within(_Use(use.nbytes + nbytes, use.count + 1), self._share(tenant, since))

    def _usage(self, since: float) -> dict[str, _Use]:
        usage: dict[str, _Use] = {}
        for name, entry in self._entries.items():
            if name in self.permanent:
                continue
            for owner, used in entry.used_by.items():
                if used > since:
                    use = usage.setdefault(owner, _Use())
                    use.nbytes += entry.nbytes
                    use.count += 1
        return usage

    def _share(self, tenant: str | None, since: float) -> _Use:
        self._active = {name: used for name, used in self._active.items() if used > since}
        active = max(len(self._active.keys() | {tenant} - {None}), 1)
        kept = sum(name in self._entries for name in self.permanent)
        return _Use((self._capacity_bytes - self.permanent_bytes) // active, (self._capacity_count - kept) // active)


def _worth(nbytes: int) -> float:
    """``cost / size``."""
    return (_FIXED_COST_BYTES + nbytes) / max(nbytes, 1)


def _is_within(use: _Use, most: _Use) -> bool:
    return use.nbytes <= most.nbytes and use.count <= most.count
