"""Bodies of uploads that are streamed from disk, and report how much of them has been sent."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping

from medley_client.files import File

Report = Callable[[int], None]
"""Called with how many bytes have been sent."""


class Multipart:
    """Fields and files as multipart/form-data."""

    def __init__(self, fields: Mapping[str, str], files: list[File], report: Callable[[int, int], None]) -> None:
        """``report`` is called with (bytes sent, bytes in all)."""
        self._boundary = secrets.token_hex(16)
        self._report = report
        self._parts: list[tuple[bytes, File | None]] = [
            (self._head(name) + value.encode() + b"\r\n", None) for name, value in fields.items()
        ]
        self._parts += [(self._head("files", file.name), file) for file in files]
        self._end = f"--{self._boundary}--\r\n".encode()
        self._total = len(self._end) + sum(len(head) + (file.nbytes + 2 if file else 0) for head, file in self._parts)

    @property
    def headers(self) -> dict[str, str]:
        return {"content-type": f"multipart/form-data; boundary={self._boundary}", "content-length": str(self._total)}

    def __iter__(self) -> Iterator[bytes]:
        sent = 0
        for chunk in self._chunks():
            yield chunk
            sent += len(chunk)
            self._report(sent, self._total)

    def _chunks(self) -> Iterator[bytes]:
        for head, file in self._parts:
            yield head
            if file is not None:
                yield from file.chunks()
                yield b"\r\n"
        yield self._end

    def _head(self, field: str, filename: str | None = None) -> bytes:
        extra = "" if filename is None else f'; filename="{filename}"\r\nContent-Type: application/octet-stream'
        return f'--{self._boundary}\r\nContent-Disposition: form-data; name="{field}"{extra}\r\n\r\n'.encode()


class Piece:
    """The bytes of a file from ``start`` to before ``end``. ``report`` is called with the position in the file."""

    def __init__(self, file: File, start: int, end: int, report: Report) -> None:
        self._file = file
        self._start = start
        self._end = end
        self._report = report

    @property
    def headers(self) -> dict[str, str]:
        return {"content-type": "application/octet-stream", "content-length": str(self._end - self._start)}

    def __iter__(self) -> Iterator[bytes]:
        position = self._start
        for chunk in self._file.chunks(self._start, self._end):
            yield chunk
            position += len(chunk)
            self._report(position)
