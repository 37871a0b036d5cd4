"""The files of composite programs: which there are and of which adapters, under one byte budget. Standard library only; knows no tensor.

Composites are made again when they are missing, and their number is not bounded by what tenants uploaded; so the least recently asked for
go first. A file in use stays: its program may have to be loaded once more.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class _Composite:
    """``nbytes`` 0: it is wanted, and not made yet. ``users`` are requests, from before they ask for it to their end."""

    digests: frozenset[str]
    nbytes: int = 0
    users: int = 0
    doomed: bool = False


class Composites:
    """A directory of its own, emptied at the start."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._known: OrderedDict[str, _Composite] = OrderedDict()

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self._known.values())

    def clear(self) -> None:
        """Remove what an earlier process left."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)
        self._known.clear()

    def path(self, program_id: str) -> Path:
        return self._directory / f"{program_id}.safetensors"

    @contextlib.contextmanager
    def using(self, program_id: str, digests: frozenset[str]) -> Iterator[None]:
        """Keep a composite of these adapters, or the place for it, while a request may need it."""
        item = self._known.setdefault(program_id, _Composite(digests))
        item.users += 1
        try:
            yield
        finally:
            item.users -= 1
            if not item.users and (item.doomed or not item.nbytes):
                self._remove(program_id)

    def find(self, program_id: str) -> Path | None:
        """The file of a composite in use, if it was made already; asking keeps it from going first."""
        item = self._known.get(program_id)
        if item is None:
            return None
        self._known.move_to_end(program_id)
        # Who asks has the adapters: pushed again, if they were deleted.
        item.doomed = False
        return self.path(program_id) if item.nbytes else None

    def add(self, program_id: str) -> None:
        """The file of a composite was just written. Others go when the budget is spent, those in use excepted."""
        item = self._known.get(program_id)
        if item is None:
            # Everybody who wanted it went away while it was made.
            self.path(program_id).unlink(missing_ok=True)
            return
        item.nbytes = self.path(program_id).stat().st_size
        for name in [name for name in self._known if name != program_id]:
            if self.nbytes <= self._max_bytes:
                break
            if not self._known[name].users:
                self._remove(name)

    def forget(self, digest: str) -> list[str]:
        """Remove the composites of an adapter, those in use when they are no longer; their program ids."""
        found = [name for name, item in self._known.items() if digest in item.digests]
        for name in found:
            self._known[name].doomed = True
            if not self._known[name].users:
                self._remove(name)
        return found

    def _remove(self, program_id: str) -> None:
        del self._known[program_id]
        self.path(program_id).unlink(missing_ok=True)
