"""Reading the files of one zip or tar, without ever letting the archive say where a byte is written.

Members are read by name into bounded sinks; links, devices, paths that leave the archive, duplicates, nested archives and
bombs are refused.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from adapter_store.errors import AdapterRejected, Fault

MAX_MEMBERS = 32
MAX_RATIO = 20
_RATIO_FLOOR = 1 << 20
_CHUNK = 1 << 20
_MAGIC = (b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"BZh", b"\xfd7zXZ")

Sink = Callable[[str], IO[bytes]]


def is_archive(path: Path) -> bool:
    """Whether the bytes are a zip or a tar (plain or gzip), whatever the file is called."""
    with path.open("rb") as file:
        start = file.read(512)
    return start.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b")) or start[257:262] == b"ustar"


def expand(path: Path, wanted: Callable[[str], bool], sink: Sink, max_bytes: int) -> tuple[str, ...]:
    """Copy wanted members into ``sink(name)``; returns the names of all that were left out. Raises AdapterRejected."""
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    try:
        return _copy(path, _zip_members(path) if is_zip else _tar_members(path), wanted, sink, max_bytes)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise _rejected("archive", f"the archive cannot be read: {type(error).__name__}") from error


class _Member:
    __slots__ = ("name", "open", "packed", "size")

    def __init__(self, name: str, size: int, packed: int, opener: Callable[[], IO[bytes] | None]) -> None:
        self.name = name
        self.size = size
        self.packed = packed
        self.open = opener


def _copy(path: Path, members: Iterator[_Member], wanted: Callable[[str], bool], sink: Sink, max_bytes: int) -> tuple[str, ...]:
    found: dict[str, str] = {}
    skipped: list[str] = []
    total, budget = 0, max(_RATIO_FLOOR, MAX_RATIO * path.stat().st_size)
    folders: set[str] = set()
    for count, member in enumerate(members, start=1):
        if count > MAX_MEMBERS:
            raise _rejected("archive", f"the archive has more than {MAX_MEMBERS} members", f"at most {MAX_MEMBERS}")
        name = _safe_name(member.name)
        folder, leaf = str(PurePosixPath(name).parent), PurePosixPath(name).name
        if not wanted(leaf):
            skipped.append(name)
            continue
        if leaf in found:
            raise _rejected(name, "the archive holds this file twice", found=f"{found[leaf]} and {name}")
        found[leaf] = name
        folders.add(folder)
        total += _copy_member(member, name, sink(leaf), min(max_bytes - total, budget - total))
    if len(folders) > 1 or any(folder.count("/") for folder in folders):
        raise _rejected(
            "archive", "the adapter's files must lie together, at the top or in one folder", found=", ".join(sorted(folders))
        )
    return tuple(skipped)


def _copy_member(member: _Member, name: str, sink: IO[bytes], limit: int) -> int:
    source = member.open()
    if source is None:
        raise _rejected(name, "the archive member is not a regular file")
    written = 0
    with source, sink:
        while chunk := source.read(_CHUNK):
            if written == 0 and chunk.startswith(_MAGIC):
                raise _rejected(name, "archives inside archives are not opened")
            written += len(chunk)
            if written > limit:
                raise _rejected(name, "the archive expands beyond what is allowed", f"at most {max(limit, 0)} bytes")
            sink.write(chunk)
    if written != member.size:
        raise _rejected(name, "the archive member is not as long as it says", f"{member.size} bytes", f"{written} bytes")
    return written


def _zip_members(path: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            kind = info.external_attr >> 28
            if kind not in (0, 0o10):
                raise _rejected(info.filename[:200], "the archive member is a link or a device")
            if info.flag_bits & 1:
                raise _rejected(info.filename[:200], "the archive member is encrypted")
            yield _Member(info.filename, info.file_size, info.compress_size, lambda info=info: archive.open(info))  # type: ignore[misc]


def _tar_members(path: Path) -> Iterator[_Member]:
    with tarfile.open(path, mode="r:*", errors="replace") as archive:
        for info in archive:
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                raise _rejected(info.name[:200], "the archive member is a link, a device or sparse")
            yield _Member(info.name, info.size, info.size, lambda info=info: archive.extractfile(info))  # type: ignore[misc]


def _safe_name(name: str) -> str:
    """A relative POSIX path without surprises. It is only ever used as a label."""
    parts = PurePosixPath(name).parts
    if not parts or "\\" in name or "\0" in name or name.startswith("/") or ".." in parts or ":" in parts[0] or len(name) > 512:
        raise _rejected(name[:200], "the archive member's path is absolute or leaves the archive")
    return str(PurePosixPath(*parts))


def _rejected(where: str, message: str, expected: str | None = None, found: str | None = None) -> AdapterRejected:
    return AdapterRejected([Fault("bad_archive", where, message, expected, found)])
