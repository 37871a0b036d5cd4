"""Blobs: files by the sha256 of their bytes. What a backend must do, and the local directory.

    blobs/
      sha256/
        ab/
          ab12…   a blob; written once, never changed
          .ab12…  one being written; what a crash leaves of it is cleared by age

Knows nothing of tenants, and not whether anybody needs a blob.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from adapter_store.durable import clear_hidden, is_whole, read_chunks, sync_directory, write_durably
from adapter_store.errors import BlobCorrupt, StoreError

_LINK_TRIES = 10
_HEX = re.compile("[0-9a-f]{64}")


class BlobStore(Protocol):
    """What a backend must do. Thread-safe. Digests are 64 hex digits; anything else raises StoreError.

    Every method may raise StoreUnavailable; the backend then answers again later, and the same call may be repeated.
    """

    def put(self, source: Path, sha256: str, *, fresh: bool = True) -> None:
        """Store a file's bytes under their digest; afterwards they survive a crash. Storing what is there already is no error.

        ``fresh`` says that nobody is known to have stored them: they are written without a look. Otherwise they are written if they are
        missing. Raises BlobCorrupt if the bytes have another digest, StorageFull.
        """

    def link(self, sha256: str, target: Path) -> None:
        """Make ``target`` a local file with the blob's bytes, which stays whatever becomes of the blob. It must never be written to.

        Raises BlobCorrupt when the blob is missing, or found to be damaged: it is hashed once per process, before its first use.
        """

    def size(self, sha256: str) -> int | None:
        """Bytes of a stored blob, None for one that is missing."""

    def delete(self, sha256: str) -> None:
        """Forget a blob; unknown ones are no error. Takes a few seconds at most: who calls this keeps others from writing the catalog."""

    def clear(self, before: float) -> int:
        """Remove what crashes left on the local disk before a time, in seconds since the epoch. Returns how many files."""


class LocalBlobs:
    """Blobs in a local directory. Files are linked, not copied: targets must be on the same filesystem."""

    def __init__(self, root: Path) -> None:
        self._root = root / "sha256"
        # A set's own operations are atomic; hashing a blob twice does no harm.
        self._verified: set[str] = set()
        self._root.mkdir(parents=True, exist_ok=True)
        for directory in (root, root.parent):
            sync_directory(directory)

    def put(self, source: Path, sha256: str, *, fresh: bool = True) -> None:
        target = self._path(sha256)
        # A damaged blob is mended by pushing it again, which is why its bytes are read and not only its name.
        if fresh or not is_whole(target, sha256):
            write_durably(read_chunks(source), sha256, target)
        self._verified.add(sha256)

    def link(self, sha256: str, target: Path) -> None:
        path = self._path(sha256)
        for _ in range(_LINK_TRIES):
            with contextlib.suppress(FileNotFoundError):
                os.link(path, target)
                self._verify(sha256, target)
                return
            # Linux says the same of a file that a put has replaced in this very moment.
            if not path.exists():
                break
        raise missing(sha256)

    def size(self, sha256: str) -> int | None:
        try:
            return self._path(sha256).stat().st_size
        except FileNotFoundError:
            return None

    def delete(self, sha256: str) -> None:
        self._path(sha256).unlink(missing_ok=True)
        self._verified.discard(sha256)

    def digests(self) -> Iterator[str]:
        """Everything stored."""
        return (path.name for path in blob_files(self._root))

    def clear(self, before: float) -> int:
        return clear_hidden(self._root, before)

    def _verify(self, sha256: str, link: Path) -> None:
        """See to it that what was linked is the blob: a disk may have changed it since it was written. Removes the link if not."""
        if sha256 in self._verified:
            return
        if not is_whole(link, sha256):
            link.unlink()
            raise BlobCorrupt(f"blob {sha256[:12]} is damaged in the store; push the adapter again")
        self._verified.add(sha256)

    def _path(self, sha256: str) -> Path:
        return self._root / blob_key(sha256)


def blob_key(sha256: str) -> str:
    """Where a blob lies below a store's root: ``ab/ab12…``. Raises StoreError for what is no digest."""
    if not _HEX.fullmatch(sha256):
        raise StoreError(f"{sha256[:80]!r} is not a sha256 digest")
    return f"{sha256[:2]}/{sha256}"


def blob_files(root: Path) -> Iterator[Path]:
    """The blobs that lie below a directory."""
    return (path for path in root.glob("??/*") if _HEX.fullmatch(path.name))


def missing(sha256: str) -> BlobCorrupt:
    """The error for a blob that ought to be there."""
    return BlobCorrupt(f"blob {sha256[:12]} is missing from the store; push the adapter again")
