"""Resumable uploads: one blob each, sent in as many pieces as the connection needs.

    partial/
      <tenant>.<id>   the bytes so far; their number is the offset at which the next piece starts

The file is all there is to an upload, so that it outlives a restart, and what came before a connection broke counts. ``<tenant>`` is the digest
of the tenant's name, which makes another's upload one that is not there. Knows no blob store: what is complete is handed to the caller.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self

from adapter_store.durable import full_disk_is_storage_full
from adapter_store.errors import DigestMismatch, OffsetMismatch, TooManyUploads, UploadNotFound, UploadTooLarge

MAX_UNFINISHED = 32
"""Uploads that a tenant may have begun and not finished."""
_ID = re.compile("[0-9a-f]{32}")


class PieceWriter:
    """Takes one piece of an upload. Every ``write`` counts as soon as it returns."""

    def __init__(self, file: FileIO, offset: int, max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes
        self.offset = offset
        """Bytes of the upload so far."""

    def write(self, data: bytes) -> int:
        """Append. Raises UploadTooLarge before anything of ``data`` is kept, StorageFull after as much of it as fits."""
        if self.offset + len(data) > self._max_bytes:
            raise UploadTooLarge(f"the upload is larger than {self._max_bytes} bytes")
        left = memoryview(data)
        with full_disk_is_storage_full():
            while left:
                written = self._file.write(left)
                self.offset += written
                left = left[written:]
        return len(data)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Uploads:
    """The unfinished uploads of all tenants in one directory, each of at most ``max_bytes``. Thread-safe, and safe beside other processes."""

    def __init__(self, root: Path, max_bytes: int) -> None:
        self._root = root
        self._root.mkdir(parents=True, exist_ok=True)
        self._max_bytes = max_bytes
        self._beginning = threading.Lock()

    def begin(self, tenant: str) -> str:
        """Start an empty upload and return its id: 128 random bits, 32 hex digits. Raises TooManyUploads."""
        prefix, upload = _prefix(tenant), secrets.token_hex(16)
        with self._beginning, full_disk_is_storage_full():
            unfinished = sum(path.name.startswith(prefix) for path in self._root.iterdir())
            if unfinished >= MAX_UNFINISHED:
                raise TooManyUploads(f"you have {unfinished} unfinished uploads; finish or cancel some of them")
            (self._root / f"{prefix}{upload}").touch(exist_ok=False)
        return upload

    def offset(self, tenant: str, upload: str) -> int:
        """Bytes that have arrived. Raises UploadNotFound."""
        try:
            return self._path(tenant, upload).stat().st_size
        except FileNotFoundError as error:
            raise _not_found(upload) from error

    def append(self, tenant: str, upload: str, offset: int) -> PieceWriter:
        """Go on at ``offset``; close what is returned. Raises UploadNotFound, and OffsetMismatch if the upload is not there, or somebody
        else is appending to it."""
        file = self._open(tenant, upload)
        size = os.fstat(file.fileno()).st_size
        if offset != size:
            file.close()
            raise OffsetMismatch(f"the upload has {size} bytes; go on from there, not from {offset}", size)
        return PieceWriter(file, size, self._max_bytes)

    @contextmanager
    def complete(self, tenant: str, upload: str, sha256: str) -> Iterator[Path]:
        """The file with all of the upload's bytes, which must have this digest. The upload is over when the block ends without an error.

        Raises UploadNotFound, OffsetMismatch (somebody is appending to it), DigestMismatch; the upload then stays as it is.
        """
        with self._open(tenant, upload) as file:
            file.seek(0)
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                nbytes = file.tell()
                raise DigestMismatch(
                    f"the {nbytes} bytes that arrived have the sha256 {found}, not {sha256[:64]}; "
                    "send what is missing, or cancel the upload and begin again"
                )
            path = self._path(tenant, upload)
            yield path
            path.unlink(missing_ok=True)

    def cancel(self, tenant: str, upload: str) -> None:
        """Forget an upload. Raises UploadNotFound."""
        try:
            self._path(tenant, upload).unlink()
        except FileNotFoundError as error:
            raise _not_found(upload) from error

    def sweep(self, before: float) -> int:
        """Forget uploads to which nothing was added since ``before`` (seconds since the epoch). Returns how many."""
        swept = 0
        for path in self._root.iterdir():
            try:
                with _locked(path) as file:
                    if os.fstat(file.fileno()).st_mtime < before:
                        path.unlink()
                        swept += 1
            except (FileNotFoundError, BlockingIOError):
                # Just finished or cancelled, or being written to.
                continue
        return swept

    def _open(self, tenant: str, upload: str) -> FileIO:
        """The upload's file, of which this is the only user until it is closed."""
        try:
            return _locked(self._path(tenant, upload))
        except FileNotFoundError as error:
            raise _not_found(upload) from error
        except BlockingIOError as error:
            size = self.offset(tenant, upload)
            raise OffsetMismatch(f"another request is writing to this upload, which has {size} bytes so far", size) from error

    def _path(self, tenant: str, upload: str) -> Path:
        if not _ID.fullmatch(upload):
            raise _not_found(upload)
        return self._root / f"{_prefix(tenant)}{upload}"


def _locked(path: Path) -> FileIO:
    """A file open for reading and appending without a buffer, and locked. Raises FileNotFoundError, BlockingIOError."""
    file = FileIO(path, "r+", opener=_append)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file.fileno()).st_nlink == 0:
            raise FileNotFoundError(path)
    except OSError:
        file.close()
        raise
    return file


def _append(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_APPEND)


def _prefix(tenant: str) -> str:
    return f"{hashlib.sha256(tenant.encode()).hexdigest()[:32]}."


def _not_found(upload: str) -> UploadNotFound:
    return UploadNotFound(f"there is no upload {upload[:32]!r}, or it is over; begin another")
