"""What a name may mean at a time, as the only one who changes it knows: a change takes effect between its request and its reply."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class _Meaning:
    content: int | None
    since: float
    until: float = math.inf


class History:
    """The meanings of one name, in order. Contents are numbers, None is no adapter; times are of one clock, in seconds."""

    def __init__(self) -> None:
        self._meanings = [_Meaning(None, -math.inf)]

    @property
    def newest(self) -> int | None:
        """What the name means once all changes have taken effect."""
        return self._meanings[-1].content

    def begin(self, content: int | None, sent: float) -> None:
        """A change is asked for. One that is never finished leaves the meaning before it possible."""
        self._meanings.append(_Meaning(content, sent))

    def finish(self, replied: float) -> None:
        """The change that was begun last is done."""
        self._meanings[-2].until = replied

    def possible(self, start: float, end: float) -> set[int | None]:
        """Everything that the name may have meant at some time from ``start`` to ``end``."""
        return {item.content for item in self._meanings if item.since <= end and item.until >= start}
