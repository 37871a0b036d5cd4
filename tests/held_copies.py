"""A device's copy stream that copies, and tells that it has, when the test says so. In order, as a stream does."""

from __future__ import annotations

from collections.abc import Callable


class HeldCopy:
    """See ``pending_copies.Copy``. What is to come behind it finds it made, though the host has not been told yet."""

    def __init__(self, stream: HeldCopies, copy: Callable[[], None]) -> None:
        self._stream = stream
        self.copy = copy
        self.told = False

    def is_done(self) -> bool:
        return self.told

    def come_first(self) -> None:
        self._stream.make_until(self)


class HeldCopies:
    """See ``pending_copies.CopyStream``."""

    def __init__(self) -> None:
        self._to_make: list[HeldCopy] = []
        self._to_tell: list[HeldCopy] = []

    @property
    def count(self) -> int:
        """Copies that the host has not been told the end of, though it may have lost interest in them."""
        return len(self._to_tell)

    def run(self, copy: Callable[[], None]) -> HeldCopy:
        held = HeldCopy(self, copy)
        self._to_make.append(held)
        self._to_tell.append(held)
        return held

    def make_until(self, last: HeldCopy) -> None:
        while last in self._to_make:
            self._to_make.pop(0).copy()

    def finish(self, count: int | None = None) -> None:
        """End the first ``count``, or all that there are."""
        for held in self._to_tell[:count]:
            self.make_until(held)
            held.told = True
        del self._to_tell[:count]
