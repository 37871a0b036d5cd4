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
    digests: frozenset[str]
    nbytes: int
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

    def find(self, program_id: str) -> Path | None:
        """Its file if there is one; asking keeps it from going first."""
        if program_id not in self._known:
            return None
        self._known.move_to_end(program_id)
        self._known[program_id].doomed = False
        return self.path(program_id)

    def add(self, program_id: str, digests: frozenset[str]) -> None:
        """A file that was just written, made of these adapters. Others go when the budget is spent."""
        self._known[program_id] = _Composite(digests, self.path(program_id).stat().st_size)
        for name in list(self._known)[:-1]:
            if self.nbytes <= self._max_bytes:
                break
            if not self._known[name].users:
                self._remove(name)

    @contextlib.contextmanager
    def using(self, program_id: str) -> Iterator[None]:
        """Keep the file while a request may need it. Ids of other programs are fine."""
        item = self._known.get(program_id)
        if item is None:
            yield
            return
        item.users += 1
        try:
            yield
        finally:
            item.users -= 1
            if item.doomed and not item.users:
                self._remove(program_id)

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
