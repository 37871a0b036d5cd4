"""How much may be copied into and within the bank between two steps. Knows numbers only. Standard library only."""

from __future__ import annotations

import sys


class CopyBudget:
    """At most ``limit_bytes`` in a step, or one copy that is larger: so that every step gets on. ``total`` only grows."""

    def __init__(self) -> None:
        self.total = 0
        self._limit_bytes = sys.maxsize
        self._before = 0

    def begin(self, limit_bytes: int) -> None:
        """A new step."""
        self._before, self._limit_bytes = self.total, limit_bytes

    def allows(self, nbytes: int) -> bool:
        """Whether so much more may be copied in this step."""
        spent = self.total - self._before
        return not spent or spent + nbytes <= self._limit_bytes

    def spend(self, nbytes: int) -> None:
        """So much was copied."""
        self.total += nbytes
