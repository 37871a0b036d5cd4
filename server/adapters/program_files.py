"""The files of lowered programs: which there are, of which adapters, and who needs them, under one byte budget. Standard library only; knows
no tensor.

Any of them can be made again from the adapters' files, so that the least recently asked for go when the budget is spent. A file in use
stays: its program may have to be loaded once more.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAX_DELETED = 4096
"""Deleted adapters that are remembered: far more than there are requests that resolved one before it went."""


@dataclass(slots=True)
class _Program:
    """``nbytes`` 0: it is wanted, and not made yet. ``users`` are requests, from before they ask for it to their end."""

    digests: frozenset[str]
    nbytes: int = 0
    users: int = 0
    facts: dict[str, Any] | None = None


class ProgramFiles:
    """A directory of its own. ``on_unused`` is told of programs of deleted adapters when their last user goes. For one event loop."""

    def __init__(self, directory: Path, max_bytes: int, on_unused: Callable[[str], None] = lambda _: None) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._on_unused = on_unused
        self._known: OrderedDict[str, _Program] = OrderedDict()
        # Digests that were deleted, and when (monotonic, s): what is made of them goes after use.
        self._deleted: OrderedDict[str, float] = OrderedDict()
        self._by_digest: dict[str, set[str]] = {}
        self._remover = ThreadPoolExecutor(1, thread_name_prefix="program-remover")
        self._removed = 0
        self.nbytes = 0

    def open(self, stored: Mapping[str, str]) -> None:
        """Take over what an earlier process left of the ``stored`` adapters (program id → digest), and remove everything else: programs
        of several adapters, of deleted ones, and interrupted writes."""
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in sorted(self._directory.iterdir(), key=lambda path: path.stat().st_mtime):
            digest = stored.get(path.stem)
            if path.is_dir():
                # Earlier versions kept programs of several adapters apart.
                shutil.rmtree(path)
                continue
            if digest is None or path.name != self.path(path.stem).name:
                path.unlink(missing_ok=True)
                continue
            self._find_or_make(path.stem, frozenset((digest,)))
            self.add(path.stem)

    def close(self) -> None:
        """Wait until what went is gone from the disk."""
        self._remover.shutdown()

    def path(self, program_id: str) -> Path:
        return self._directory / f"{program_id}.safetensors"

    @contextlib.contextmanager
    def using(self, program_id: str, digests: frozenset[str], since: float) -> Iterator[None]:
        """Keep a program of these adapters, or the place for it, while somebody may need it.

        ``since`` (monotonic, s) is from before the store was asked for them: deleted ones that it gives after that were pushed again.
        """
        for digest in digests:
            if self._deleted.get(digest, since) < since:
                del self._deleted[digest]
        item = self._find_or_make(program_id, digests)
        item.users += 1
        try:
            yield
        finally:
            item.users -= 1
            is_deleted = not item.digests.isdisjoint(self._deleted)
            if not item.users and (is_deleted or not item.nbytes):
                self._remove(program_id)
                if is_deleted:
                    self._on_unused(program_id)

    def find(self, program_id: str) -> Path | None:
        """The file of a program in use, if it was made already; asking keeps it from going first."""
        item = self._known.get(program_id)
        if item is None:
            return None
        self._known.move_to_end(program_id)
        path = self.path(program_id)
        return path if item.nbytes and path.exists() else None

    def knows(self, program_id: str) -> bool:
        """Whether the program is there, or somebody wants it."""
        return program_id in self._known

    def facts(self, program_id: str) -> dict[str, Any] | None:
        """What is remembered of a program."""
        return self._known[program_id].facts if program_id in self._known else None

    def remember(self, program_id: str, facts: dict[str, Any]) -> None:
        """Keep what is known of a program, so that its file need not be opened for each request."""
        if program_id in self._known:
            self._known[program_id].facts = facts

    def add(self, program_id: str, facts: dict[str, Any] | None = None) -> None:
        """The file of a program was written. Others go when the budget is spent, those in use excepted."""
        item = self._known.get(program_id)
        path = self.path(program_id)
        if item is None:
            # Everybody who wanted it went away while it was made.
            self._unlink(program_id)
            return
        self.nbytes -= item.nbytes
        item.nbytes, item.facts = path.stat().st_size, facts
        self.nbytes += item.nbytes
        self._known.move_to_end(program_id)
        for name in list(self._known):
            if self.nbytes <= self._max_bytes:
                break
            if name != program_id and not self._known[name].users:
                self._remove(name)

    def discard(self, program_id: str) -> None:
        """Remove a file that is of no use."""
        item = self._known.get(program_id)
        if item is not None:
            self.nbytes -= item.nbytes
            item.nbytes, item.facts = 0, None
        self._unlink(program_id)

    def forget(self, digest: str) -> list[str]:
        """An adapter was deleted: remove what is made of it. Returns the ids of the programs that nobody uses; ``on_unused`` tells of the
        others later."""
        self._deleted[digest] = time.monotonic()
        self._deleted.move_to_end(digest)
        if len(self._deleted) > _MAX_DELETED:
            self._deleted.popitem(last=False)
        unused = [name for name in self._by_digest.get(digest, ()) if not self._known[name].users]
        for name in unused:
            self._remove(name)
        return unused

    def keep(self, digest: str) -> None:
        """An adapter was stored, again if it was deleted before."""
        self._deleted.pop(digest, None)

    def _find_or_make(self, program_id: str, digests: frozenset[str]) -> _Program:
        item = self._known.get(program_id)
        if item is None:
            item = self._known[program_id] = _Program(digests)
            for digest in digests:
                self._by_digest.setdefault(digest, set()).add(program_id)
        return item

    def _remove(self, program_id: str) -> None:
        item = self._known.pop(program_id)
        self.nbytes -= item.nbytes
        for digest in item.digests:
            self._by_digest[digest].discard(program_id)
            if not self._by_digest[digest]:
                del self._by_digest[digest]
        self._unlink(program_id)

    def _unlink(self, program_id: str) -> None:
        """Out of the way at once, so that it can be made again; off the disk in a thread, since large files take long."""
        self._removed += 1
        aside = self._directory / f".removed-{self._removed}"
        with contextlib.suppress(FileNotFoundError):
            self.path(program_id).replace(aside)
            self._remover.submit(aside.unlink, missing_ok=True)
