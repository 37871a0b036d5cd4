"""Files that are there whole or not at all, whatever happens to the process or the machine. Knows no blobs and no tenants.

While it is written a file is hidden: its name begins with a dot. A crash may leave such a file; ``clear_hidden`` removes it later.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter_store.errors import BlobCorrupt, StorageFull

CHUNK = 1 << 20
"""Bytes that are read at a time."""


def write_durably(chunks: Iterable[bytes], sha256: str, target: Path) -> None:
    """Make ``target`` out of chunks whose digest must be ``sha256``, and its directory if need be. On return it survives a power failure.

    Raises BlobCorrupt if the digest is another, StorageFull; then there is no new file.
    """
    hidden = target.parent / f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}"
    digest = hashlib.sha256()
    try:
        with full_disk_is_storage_full():
            target.parent.mkdir(exist_ok=True)
            # Each time, as whoever has made the directory may not have come to this yet.
            sync_directory(target.parent.parent)
            with hidden.open("xb") as writer:
                for chunk in chunks:
                    digest.update(chunk)
                    writer.write(chunk)
                writer.flush()
                os.fsync(writer.fileno())
            if digest.hexdigest() != sha256:
                raise BlobCorrupt(f"the bytes that came for blob {sha256[:12]} have another digest")
            os.replace(hidden, target)
            sync_directory(target.parent)
    finally:
        hidden.unlink(missing_ok=True)


def read_chunks(source: Path) -> Iterator[bytes]:
    """A file's bytes, piece by piece."""
    with source.open("rb") as reader:
        while chunk := reader.read(CHUNK):
            yield chunk


def digest_of(source: Path) -> str:
    """The sha256 of a file, 64 hex digits."""
    with source.open("rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()


def is_whole(path: Path, sha256: str) -> bool:
    """Whether a file is there and has this digest."""
    try:
        return digest_of(path) == sha256
    except FileNotFoundError:
        return False


def clear_hidden(root: Path, before: float) -> int:
    """Remove what crashes left under ``root``: hidden files that nobody has written to since ``before`` (seconds since the epoch).
    Returns how many."""
    stale = [path for path in root.rglob(".*") if _last_write(path) < before]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)


def clear_directories(root: Path, before: float) -> int:
    """Remove the directories in ``root`` in which nothing was written since ``before`` (seconds since the epoch). Returns how many."""
    stale = [path for path in root.iterdir() if max(map(_last_write, (path, *path.glob("*")))) < before]
    for path in stale:
        shutil.rmtree(path, ignore_errors=True)
    return len(stale)


@contextmanager
def full_disk_is_storage_full() -> Iterator[None]:
    """Turn "no space left", and the quotas that amount to it, into StorageFull."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StorageFull("no space is left on the store's disk") from error
        raise


def sync_directory(directory: Path) -> None:
    """See to it that the directory's entries survive a power failure."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _last_write(path: Path) -> float:
    """Seconds since the epoch; infinite for what has just gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return math.inf
