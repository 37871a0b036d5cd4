"""A flat tensor with a fixed address, and who holds which range of it. Knows elements, not what they are."""

from __future__ import annotations

from collections.abc import Callable

import torch

from server.adapters.copy_budget import CopyBudget
from server.adapters.extents import Extents, Slide


class Arena:
    """``data`` of at most ``capacity_bytes``, given out in multiples of ``unit`` elements. Address space, not memory: pages are touched when
    something is copied in."""

    def __init__(self, capacity_bytes: int, unit: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self._extents = Extents(capacity_bytes // dtype.itemsize, unit)
        self.data = torch.empty(self._extents.capacity, dtype=dtype, device=device)

    def nbytes(self, length: int) -> int:
        """The bytes that a range of ``length`` elements takes, rounding included."""
        return self._extents.rounded(length) * self.data.itemsize

    def allocate(self, length: int, copies: CopyBudget, moved: Callable[[Slide], None]) -> int | None:
        """The start of a range that there is room for, if need be pushed together: ``moved`` is told of every range that went elsewhere.
        None: that takes more than is left of this step's copies."""
        while (start := self._extents.allocate(length)) is None:
            slide = self._extents.next_slide()
            assert slide is not None, "room by the budget is room in the arena"
            if not copies.allows(slide.length * self.data.itemsize):
                return None
            self._copy_down(slide)
            self._extents.slide()
            copies.spend(slide.length * self.data.itemsize)
            moved(slide)
        return start

    def release(self, start: int, length: int) -> None:
        """Give back what ``allocate`` returned for ``length``."""
        self._extents.release(start, length)

    def _copy_down(self, slide: Slide) -> None:
        """By way of a copy, since the two ranges may overlap. Where there is no memory for it, nothing has changed."""
        self.data[slide.to : slide.to + slide.length] = self.data[slide.start : slide.start + slide.length].clone()
