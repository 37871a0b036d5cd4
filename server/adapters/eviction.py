"""Which programs go when room is needed. Knows names, bytes, uses and tenants; not what a program is. Standard library only.

GDSF, greedy-dual-size-frequency (Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Labs
1998): the lowest ``L + frequency * cost / size`` goes first. ``L`` is the value of what went last, so that programs that were used
long ago fall behind new ones. ``cost`` is the time that bringing the program in again takes, in bytes copied meanwhile.

Over it stands a guarantee. The tenants that were active in the last ``window_s`` seconds share the room equally, in bytes and in number. What
a tenant uses, or used in that time, is never taken for another tenant while its owner is within its share; what a tenant over its share or
the asking tenant itself used can be taken. A program that several tenants used counts for each of them in full.

What tenants use is counted as it changes, and an attempt that fails costs a look at every program only once until something changes: with
many who wait for room, most attempts fail.
"""

from __future__ import annotations

import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple, TypeVar

K = TypeVar("K")

WINDOW_S = 10.0
_FIXED_COST_BYTES = 1 << 20
"""Opening, parsing and laying out a program takes as long as copying about a megabyte."""


@dataclass(slots=True)
class _Entry:
    nbytes: int
    frequency: int
    value: float
    references: Counter[str] = field(default_factory=Counter)
    """By tenant: uses that go on."""
    owners: set[str] = field(default_factory=set)
    """Tenants that use the program, or did in the window."""


@dataclass(slots=True)
class _Use:
    """What some programs take together."""

    nbytes: int = 0
    count: int = 0

    def add(self, nbytes: int, count: int) -> None:
        self.nbytes += nbytes
        self.count += count


class _Evictable(NamedTuple):
    entries: list[tuple[str, _Entry]]
    total: _Use


class Eviction:
    """The policy over one tier of ``capacity_bytes`` and ``capacity_count`` programs. ``clock`` is in seconds.

    Programs that an explicit pin keeps, in the tier or not, never go, and what is left beside them is shared.
    """

    def __init__(
        self,
        capacity_bytes: int,
        capacity_count: int = sys.maxsize,
        *,
        window_s: float = WINDOW_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._capacity_bytes = capacity_bytes
        self._capacity_count = capacity_count
        self._window_s = window_s
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._permanent: set[str] = set()
        self._kept = _Use()
        self._usage: dict[str, _Use] = {}
        # When a tenant last used a program, and any; the longest ago first.
        self._recent: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._active: OrderedDict[str, float] = OrderedDict()
        self._references: Counter[str] = Counter()
        # Until something changes: what may go at all, lowest value first, and what can be had of it at most, by who asks and how.
        self._evictable: dict[bool, _Evictable] = {}
        self._most: dict[tuple[str | None, int, int, bool, bool], _Use] = {}
        self._inflation = 0.0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def permanent_bytes(self) -> int:
        """What the permanent programs in the tier take."""
        return self._kept.nbytes

    @property
    def num_staying(self) -> int:
        """Programs of the tier that cannot go now: in use, or permanent."""
        return sum(1 for name, entry in self._entries.items() if entry.references or name in self._permanent)

    def is_permanent(self, name: str) -> bool:
        """Whether a program is in the tier and stays there."""
        return name in self._permanent and name in self._entries

    def is_held(self, name: str) -> bool:
        """Whether a program is in use."""
        entry = self._entries.get(name)
        return entry is not None and bool(entry.references)

    def keep(self, name: str) -> None:
        """An explicit pin: in the tier or not, the program is permanent from now on."""
        if name in self._permanent:
            return
        if (entry := self._entries.get(name)) is not None:
            self._count(name, entry.owners, -1)
            self._kept.add(entry.nbytes, 1)
        self._permanent.add(name)
        self._changed()

    def let_go(self, name: str) -> None:
        """The program is one among others again."""
        if name not in self._permanent:
            return
        self._permanent.remove(name)
        if (entry := self._entries.get(name)) is not None:
            self._kept.add(-entry.nbytes, -1)
            self._count(name, entry.owners, 1)

    def add(self, name: str, nbytes: int, tenant: str | None = None) -> None:
        """A program has come into the tier, for a tenant (None: nobody) that uses it from now on."""
        self._entries[name] = _Entry(nbytes, 1, self._inflation + _worth(nbytes))
        self._changed()
        if name in self._permanent:
            self._kept.add(nbytes, 1)
        if tenant is not None:
            self._touch(name, tenant)

    def use(self, name: str, tenant: str) -> None:
        """A tenant's request uses a program of the tier: counted once a request."""
        entry = self._entries[name]
        entry.frequency += 1
        entry.value = self._inflation + entry.frequency * _worth(entry.nbytes)
        self._touch(name, tenant)

    def hold(self, name: str, tenant: str) -> None:
        """A tenant's sequence uses a program until ``release``: it does not go, and counts as used by the tenant all the time."""
        self._entries[name].references[tenant] += 1
        self._references[tenant] += 1
        self._touch(name, tenant)

    def release(self, name: str, tenant: str) -> None:
        """The end of what ``hold`` began."""
        for references in (self._entries[name].references, self._references):
            references[tenant] -= 1
            if not references[tenant]:
                del references[tenant]
        self._touch(name, tenant)

    def evict(self, name: str) -> None:
        """A program went because room was needed."""
        self._inflation = max(self._inflation, self._entries[name].value)
        self.remove(name)

    def remove(self, name: str) -> None:
        """A program went for another reason, which says nothing of the others."""
        entry = self._entries[name]
        self._count(name, entry.owners, -1)
        if name in self._permanent:
            self._kept.add(-entry.nbytes, -1)
        for tenant in entry.owners:
            del self._recent[name, tenant]
        del self._entries[name]
        self._changed()

    def recheck(self) -> None:
        """``stays`` of ``choose`` may say something else from now on."""
        self._changed()

    def choose(
        self,
        tenant: str | None,
        nbytes: int,
        count: int,
        *,
        stays: Callable[[str], bool] = lambda _: False,
        shares: bool = True,
        drains: bool = False,
    ) -> list[str] | None:
        """The programs to evict for ``tenant`` so that ``nbytes`` and ``count`` places more are free; None: there are not enough.

        ``tenant`` None is nobody, who has no share. Permanent programs stay, those in use unless ``drains``, those that ``stays`` says (always
        the same, until ``recheck``), and with ``shares`` what is guaranteed to others.
        """
        if nbytes <= 0 and count <= 0:
            return []
        self._forget_old_uses()
        evictable = self._find_evictable(stays, drains)
        if nbytes > evictable.total.nbytes or count > evictable.total.count:
            return None
        share = self._share(tenant)
        # Tenants that use nothing here are answered alike.
        key = (tenant if tenant in self._usage else None, share.nbytes, share.count, shares, drains)
        most = self._most.get(key)
        if most is not None and (nbytes > most.nbytes or count > most.count):
            return None
        chosen: list[str] = []
        total = _Use()
        taken: dict[str, _Use] = {}
        for name, entry in evictable.entries:
            if shares and any(owner != tenant and self._is_owed(owner, taken, share) for owner in entry.owners):
                continue
            chosen.append(name)
            total.add(entry.nbytes, 1)
            if nbytes <= total.nbytes and count <= total.count:
                return chosen
            for owner in entry.owners:
                taken.setdefault(owner, _Use()).add(entry.nbytes, 1)
        self._most[key] = total
        return None

    def is_within_share(self, tenant: str, nbytes: int) -> bool:
        """Whether a tenant stays within its share with one more program of ``nbytes``."""
        self._forget_old_uses()
        use, share = self._usage.get(tenant, _Use()), self._share(tenant)
        return use.nbytes + nbytes <= share.nbytes and use.count + 1 <= share.count

    def _find_evictable(self, stays: Callable[[str], bool], drains: bool) -> _Evictable:
        found = self._evictable.get(drains)
        if found is None:
            entries = [
                (name, entry)
                for name, entry in self._entries.items()
                if name not in self._permanent and (drains or not entry.references) and not stays(name)
            ]
            entries.sort(key=lambda item: item[1].value)
            found = _Evictable(entries, _Use(sum(entry.nbytes for _, entry in entries), len(entries)))
            self._evictable[drains] = found
        return found

    def _changed(self) -> None:
        self._evictable.clear()
        self._most.clear()

    def _is_owed(self, owner: str, taken: dict[str, _Use], share: _Use) -> bool:
        """Whether a tenant is within its share, when some of what it uses has been taken."""
        use, less = self._usage[owner], taken.get(owner, _Use())
        return use.nbytes - less.nbytes <= share.nbytes and use.count - less.count <= share.count

    def _share(self, tenant: str | None) -> _Use:
        active = max(len(self._active) + (tenant is not None and tenant not in self._active), 1)
        return _Use((self._capacity_bytes - self._kept.nbytes) // active, (self._capacity_count - self._kept.count) // active)

    def _touch(self, name: str, tenant: str) -> None:
        entry, now = self._entries[name], self._clock()
        self._changed()
        _renew(self._recent, (name, tenant), now)
        _renew(self._active, tenant, now)
        if tenant not in entry.owners:
            entry.owners.add(tenant)
            self._count(name, [tenant], 1)

    def _forget_old_uses(self) -> None:
        """What was used too long ago is not any more; what is still in use is as recent as now."""
        now = self._clock()
        for name, tenant in _until(self._recent, now - self._window_s):
            entry = self._entries[name]
            if tenant in entry.references:
                _renew(self._recent, (name, tenant), now)
            else:
                del self._recent[name, tenant]
                entry.owners.remove(tenant)
                self._count(name, [tenant], -1)
        for tenant in _until(self._active, now - self._window_s):
            if tenant in self._references:
                _renew(self._active, tenant, now)
            else:
                del self._active[tenant]

    def _count(self, name: str, tenants: Iterable[str], sign: int) -> None:
        """Tenants use a program, or (``sign`` -1) do not any more. What is permanent counts for nobody."""
        self._changed()
        if name in self._permanent:
            return
        for tenant in tenants:
            use = self._usage.setdefault(tenant, _Use())
            use.add(sign * self._entries[name].nbytes, sign)
            if not use.count:
                del self._usage[tenant]


def _worth(nbytes: int) -> float:
    """``cost / size``."""
    return (_FIXED_COST_BYTES + nbytes) / max(nbytes, 1)


def _renew(times: OrderedDict[K, float], key: K, now: float) -> None:
    times[key] = now
    times.move_to_end(key)


def _until(times: OrderedDict[K, float], time_s: float) -> list[K]:
    """The keys of that time or before."""
    return list(takewhile(lambda key: times[key] <= time_s, times))
