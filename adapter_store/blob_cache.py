"""Local copies of blobs that live elsewhere: verified, least recently used out first, one download at a time of each.

    cache/
      ab/
        ab12…    a copy, complete and on disk
        .ab12…   one being downloaded

Knows not where blobs come from. A copy is hashed once per process, before its first use: a disk that changed it meanwhile is found out.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path

from adapter_store.blobs import blob_key
from adapter_store.durable import clear_hidden, is_whole, write_durably

Fetch = Callable[[str], Iterable[bytes]]
"""Download a blob by its digest, piece by piece."""


class BlobCache:
    """Copies up to ``max_bytes``; the newest one stays even if it alone is larger. Thread-safe.

    Files that are linked somewhere else take their space until those links go, beyond the budget.
    """

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._root.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._sizes = OrderedDict(_found(root))
        self._verified: set[str] = set()
        self._flights: dict[str, Future[None]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all copies."""
        with self._lock:
            return sum(self._sizes.values())

    def link(self, sha256: str, target: Path, fetch: Fetch) -> None:
        """Make ``target`` a hard link to the copy, which is fetched first if need be. Raises what ``fetch`` raises, BlobCorrupt, StorageFull."""
        while not self._linked(sha256, target):
            with self._lock:
                flight = self._flights.get(sha256)
                if flight is None:
                    own = self._flights[sha256] = Future()
            if flight is not None:
                flight.result()
                continue
            try:
                self._provide(sha256, fetch)
            except BaseException as error:
                own.set_exception(error)
                raise
            else:
                own.set_result(None)
            finally:
                with self._lock:
                    del self._flights[sha256]

    def forget(self, sha256: str) -> None:
        """Remove a copy, if there is one."""
        with self._lock:
            self._drop(sha256)

    def clear(self, before: float) -> int:
        """Remove downloads that a crash broke off before a time, in seconds since the epoch. Returns how many."""
        return clear_hidden(self._root, before)

    def _linked(self, sha256: str, target: Path) -> bool:
        """Link a copy that is known to be good."""
        with self._lock:
            if sha256 not in self._verified:
                return False
            try:
                os.link(self._path(sha256), target)
            except FileNotFoundError:
                # Another process that shares the directory has evicted it.
                self._drop(sha256)
                return False
            self._sizes.move_to_end(sha256)
            return True

    def _provide(self, sha256: str, fetch: Fetch) -> None:
        """See to it that a good copy is there. Only one thread at a time for each blob."""
        path = self._path(sha256)
        if not is_whole(path, sha256):
            write_durably(fetch(sha256), sha256, path)
        with self._lock:
            try:
                self._sizes[sha256] = path.stat().st_size
            except FileNotFoundError:
                # Another process that shares the directory has evicted it; whoever wants it provides it again.
                return
            self._sizes.move_to_end(sha256)
            self._verified.add(sha256)
            total = sum(self._sizes.values())
            while total > self._max_bytes and len(self._sizes) > 1:
                oldest = next(iter(self._sizes))
                total -= self._sizes[oldest]
                self._drop(oldest)

    def _drop(self, sha256: str) -> None:
        self._sizes.pop(sha256, None)
        self._verified.discard(sha256)
        self._path(sha256).unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path:
        return self._root / blob_key(sha256)


def _found(root: Path) -> list[tuple[str, int]]:
    """Digest and size of the copies that an earlier process left, the longest untouched first."""
    found = [(path.name, path.stat()) for path in root.glob("??/*") if not path.name.startswith(".")]
    return [(name, stat.st_size) for name, stat in sorted(found, key=lambda item: item[1].st_mtime)]
