"""Programs whose copies to the device are under way. Knows names and whom to ask, not what is copied. Standard library only.

The host never waits for a copy: it asks at the beginning of every step which ones are done.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Copy(Protocol):
    """One program's copies."""

    def is_done(self) -> bool:
        """Whether all of it has arrived. Asks the device, without waiting for it."""

    def come_first(self) -> None:
        """What steps give the device from now on is done after this. The host does not wait."""


class CopyStream(Protocol):
    """Where a device copies beside its steps."""

    def run(self, copy: Callable[[], None]) -> Copy:
        """Start what ``copy`` copies, behind all that steps have given the device so far. What it raises leaves nothing under way."""


class PendingCopies:
    """By program. Without a ``stream``, copies are done when ``run`` returns, or come before the step that reads them: none is ever pending.

    A program stays on the device from the start of its copy to the end of the first step that can use it. Otherwise two that each want the
    other's room could push each other out for ever, each before its own requests had their turn.
    """

    def __init__(self, stream: CopyStream | None) -> None:
        self._stream = stream
        self._copies: dict[str, Copy] = {}
        self._arrived: set[str] = set()

    def __bool__(self) -> bool:
        """Whether the next step may find something changed here."""
        return bool(self._copies or self._arrived)

    def run(self, program_id: str, copy: Callable[[], None]) -> None:
        """Copy a program to the device."""
        if self._stream is None:
            copy()
        else:
            self._copies[program_id] = self._stream.run(copy)

    def is_pending(self, program_id: str) -> bool:
        """Whether a program is not yet all there, as far as the last step found."""
        return program_id in self._copies

    def stays(self, program_id: str) -> bool:
        """Whether a program must not go for another one."""
        return program_id in self._copies or program_id in self._arrived

    def begin_step(self) -> bool:
        """Ask what is done. Whether some programs stay no longer."""
        had_its_step = bool(self._arrived)
        self._arrived = {program_id for program_id, copy in self._copies.items() if copy.is_done()}
        for program_id in self._arrived:
            del self._copies[program_id]
        return had_its_step

    def come_first(self, program_id: str) -> None:
        """What steps give the device from now on comes behind the program's copy, if that is under way: its range is about to be used otherwise."""
        if (copy := self._copies.get(program_id)) is not None:
            copy.come_first()

    def forget(self, program_id: str) -> None:
        """The program goes, and so does its memory: what is put there next comes behind its copy."""
        self.come_first(program_id)
        self._copies.pop(program_id, None)
        self._arrived.discard(program_id)

    def forget_all(self) -> None:
        """The device's memory is given back."""
        for program_id in list(self._copies):
            self.forget(program_id)
