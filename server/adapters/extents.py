"""Extents of a fixed arena: who holds which range of elements. Standard library only."""

from __future__ import annotations

from bisect import insort
from typing import NamedTuple


class Slide(NamedTuple):
    """A range of ``length`` elements moves down, from ``start`` to ``to``. The two may overlap."""

    start: int
    to: int
    length: int


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

    def rounded(self, length: int) -> int:
        """How many elements a range of ``length`` takes."""
        return -(-length // self.unit) * self.unit

    def allocate(self, length: int) -> int | None:
        """The start of a free range of at least ``length`` elements, or None. An empty range needs no room."""
        if length == 0:
            return 0
        rounded = self.rounded(length)
        for index, (start, size) in enumerate(self._free):
            if size >= rounded:
                rest = (start + rounded, size - rounded)
                self._free[index : index + 1] = [rest] if rest[1] else []
                self._used[start] = rounded
                return start
        return None

    def release(self, start: int, length: int) -> None:
        """Give back what ``allocate(length)`` returned."""
        if length:
            self._give_back(start, self._used.pop(start))

    def next_slide(self) -> Slide | None:
        """What ``slide`` would move. Changes nothing."""
        if not self._free or sum(self._free[0]) == self.capacity:
            return None
        to, gap = self._free[0]
        return Slide(to + gap, to, self._used[to + gap])

    def slide(self) -> Slide | None:
        """Move the range behind the first gap down into it; None when all that is free lies at the end. Repeated, gaps become one."""
        slide = self.next_slide()
        if slide is not None:
            del self._free[0]
            self._used[slide.to] = self._used.pop(slide.start)
            self._give_back(slide.to + slide.length, slide.start - slide.to)
        return slide

    def _give_back(self, start: int, size: int) -> None:
        insort(self._free, (start, size))
        merged: list[tuple[int, int]] = []
        for begin, extent in self._free:
            if merged and merged[-1][0] + merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + extent)
            else:
                merged.append((begin, extent))
        self._free = merged
