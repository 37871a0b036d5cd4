"""Extents of a fixed arena: who holds which range of elements. Standard library only."""

from __future__ import annotations


class Extents:
    """First-fit allocation of ranges, in multiples of ``unit``; freed neighbours merge."""

    def __init__(self, capacity: int, unit: int) -> None:
        self.unit = unit
        self.capacity = capacity - capacity % unit
        self._free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []
        self._used: dict[int, int] = {}

    @property
    def used(self) -> int:
        return sum(self._used.values())

    def allocate(self, length: int) -> int | None:
        """The start of a free range of at least ``length`` elements, or None. An empty range needs no room."""
        if length == 0:
            return 0
        rounded = -(-length // self.unit) * self.unit
        for index, (start, size) in enumerate(self._free):
            if size >= rounded:
                rest = (start + rounded, size - rounded)
                self._free[index : index + 1] = [rest] if rest[1] else []
                self._used[start] = rounded
                return start
        return None

    def release(self, start: int, length: int) -> None:
        """Give back what ``allocate(length)`` returned."""
        if length == 0:
            return
        size = self._used.pop(start)
        self._free.append((start, size))
        self._free.sort()
        merged: list[tuple[int, int]] = []
        for begin, extent in self._free:
            if merged and merged[-1][0] + merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + extent)
            else:
                merged.append((begin, extent))
        self._free = merged
