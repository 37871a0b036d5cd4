"""Pulling an adapter: its files as they were uploaded, each checked against its digest before it gets its name."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from medley_client.adapter_flows import ADAPTERS, address, read_file
from medley_client.errors import MedleyError
from medley_client.files import File, Progress
from medley_client.flow import Call, Flow, request, send, work
from medley_client.types import PulledAdapter, StoredFile


def pull(reference: str, directory: Path, overwrite: bool, progress: Progress | None) -> Flow[PulledAdapter]:
    """Raises MedleyError before anything is written, when a file is there with other content and ``overwrite`` is not wanted."""
    listed = yield from request(Call("GET", address(ADAPTERS, reference, "files")))
    # What the reference means may move meanwhile; the version's files cannot.
    version = f"{listed['name']}@{listed['version']}"
    files = tuple(read_file(item) for item in listed["data"])
    missing, others = yield from work(partial(_compare, directory, files))
    if others and not overwrite:
        raise MedleyError(f"{directory} has other content in {', '.join(others)}; pull to another directory, or overwrite it")
    total = sum(file.nbytes for file in missing)
    before = 0
    for file in missing:
        with Download(_place(directory, file), file, _reporter(progress, before, total)) as download:
            yield from send(Call("GET", address(ADAPTERS, version, "files", file.name), sink=download))
            download.finish()
        before += file.nbytes
    return PulledAdapter(listed["name"], listed["version"], str(directory), files)


class Download:
    """A file on its way: a temporary file beside its place, which it takes when all of it has arrived."""

    def __init__(self, place: Path, file: StoredFile, report: Callable[[int], None]) -> None:
        self._place = place
        self._file = file
        self._report = report
        place.parent.mkdir(parents=True, exist_ok=True)
        # Not from tempfile: this becomes a file like any other, which more than its owner may read.
        self._path = place.with_name(f".{place.name}-{secrets.token_hex(8)}")
        self._handle = self._path.open("xb")
        self.begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._handle.close()
        self._path.unlink(missing_ok=True)

    def begin(self) -> None:
        """From the start, whatever came before."""
        self._handle.seek(0)
        self._handle.truncate()
        self._hash = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        self._handle.write(chunk)
        self._hash.update(chunk)
        self._report(self._handle.tell())

    def finish(self) -> None:
        """Give it its name. Raises MedleyError if these are not the bytes that were announced."""
        found = f"sha256:{self._hash.hexdigest()}"
        if found != self._file.digest:
            raise MedleyError(f"{self._file.name} arrived damaged: expected {self._file.digest}, found {found}; pull again")
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._path.replace(self._place)


def _compare(directory: Path, files: tuple[StoredFile, ...]) -> tuple[list[StoredFile], list[str]]:
    """The files that are not there as they should be, and the names of those among them that are there with other content."""
    missing, others = [], []
    for file in files:
        place = _place(directory, file)
        if place.is_file() and File(file.name, place).digest(lambda _: None) == file.digest:
            continue
        missing.append(file)
        if place.exists():
            others.append(file.name)
    return missing, others


def _place(directory: Path, file: StoredFile) -> Path:
    """Where the file goes. What a server says never leads out of the directory."""
    name = PurePosixPath(file.name)
    is_plain = file.name.isprintable() and not any(mark in file.name for mark in "\\:")
    if not is_plain or not name.parts or name.is_absolute() or ".." in name.parts:
        raise MedleyError(f"the server gave a file the name {file.name[:80]!r}, which would not stay in {directory}")
    return directory / name


def _reporter(progress: Progress | None, before: int, total: int) -> Callable[[int], None]:
    return lambda position: progress("receiving", before + position, total) if progress is not None else None
