"""Content-addressed files.

    blobs/
      sha256/
        ab/
          ab12…   a blob, named by the sha256 of its bytes; written once, never changed
    uploads/      temporary directories of uploads under way; swept at start

A blob becomes visible by a rename after its bytes are on disk, so that it is there whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from adapter_store.errors import BlobCorrupt, StorageFull, StoreError

_HEX = re.compile("[0-9a-f]{64}")


class BlobStore(Protocol):
    """What a backend must do. Digests are 64 hex digits."""

    def put(self, source: Path, sha256: str) -> None:
        """Store a file's bytes under their digest. Storing what is there already is no error."""

    def path(self, sha256: str) -> Path:
        """A local file with the blob's bytes. Raises BlobCorrupt when it is missing."""

    def delete(self, sha256: str) -> None:
        """Forget a blob; unknown ones are no error."""

    def digests(self) -> Iterator[str]:
        """Everything stored."""


class LocalBlobs:
    """Blobs in a local directory."""

    def __init__(self, root: Path) -> None:
        self._root = root / "sha256"
        self._root.mkdir(parents=True, exist_ok=True)

    def put(self, source: Path, sha256: str) -> None:
        target = self._place(sha256)
        if target.exists():
            return
        target.parent.mkdir(exist_ok=True)
        temporary = target.parent / f".{sha256}.{os.getpid()}.{os.urandom(4).hex()}"
        try:
            self._copy(source, temporary, sha256)
            os.replace(temporary, target)
            _sync_directory(target.parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StorageFull("no space is left to store the adapter") from error
            raise
        finally:
            temporary.unlink(missing_ok=True)

    def path(self, sha256: str) -> Path:
        target = self._place(sha256)
        if not target.exists():
            raise BlobCorrupt(f"blob {sha256[:12]} is missing from the store")
        return target

    def delete(self, sha256: str) -> None:
        self._place(sha256).unlink(missing_ok=True)

    def digests(self) -> Iterator[str]:
        for path in self._root.glob("??/*"):
            if _HEX.fullmatch(path.name):
                yield path.name

    def _copy(self, source: Path, target: Path, sha256: str) -> None:
        digest = hashlib.sha256()
        with source.open("rb") as reader, target.open("xb") as writer:
            while chunk := reader.read(1 << 20):
                digest.update(chunk)
                writer.write(chunk)
            writer.flush()
            os.fsync(writer.fileno())
        if digest.hexdigest() != sha256:
            raise BlobCorrupt(f"the bytes stored for {sha256[:12]} have another digest")

    def _place(self, sha256: str) -> Path:
        if not _HEX.fullmatch(sha256):
            raise StoreError(f"{sha256[:80]!r} is not a sha256 digest")
        return self._root / sha256[:2] / sha256


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
