"""A multipart upload as it arrives: files go straight into the staging area, the few fields of the form are kept.

Nothing is buffered but the part at hand.
"""

from __future__ import annotations

import asyncio
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from adapter_store.staging import Staging
from server.api.body import chunks
from server.errors import ApiError

MAX_PARTS = 64
_MAX_FIELD = 256
_FIELDS = ("name", "tag")


class _Parts:
    """Feeds multipart parts into the staging area as they arrive; nothing is buffered but the part at hand."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._headers: dict[bytes, bytes] = {}
        self._field = self._value = b""
        self._sink: Any = None
        self._form: bytearray | None = None
        self._form_name = ""
        self._count = 0
        self.fields: dict[str, str] = {}

    def callbacks(self) -> dict[str, Any]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self._close,
        }

    def _begin(self) -> None:
        self._count += 1
        if self._count > MAX_PARTS:
            raise ApiError("invalid_request", f"the form has more than {MAX_PARTS} parts")
        self._headers, self._field, self._value, self._sink, self._form = {}, b"", b"", None, None

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _open(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        filename = options.get(b"filename")
        if filename is not None:
            self._sink = self._staging.open(filename.decode("utf-8", "replace"))
            return
        self._form_name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._form_name not in _FIELDS:
            raise ApiError(
                "invalid_request",
                f"the form has an unknown field {self._form_name[:80]!r}; known: {', '.join(_FIELDS)}, and files",
                param=self._form_name[:80],
            )
        self._form = bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._sink is not None:
            self._sink.write(data[start:end])
        elif self._form is not None:
            self._form += data[start:end]
            if len(self._form) > _MAX_FIELD:
                raise ApiError("invalid_request", f"the form field {self._form_name!r} is too long", param=self._form_name)

    def _close(self) -> None:
        if self._sink is not None:
            self._sink.close()
        elif self._form is not None:
            self.fields[self._form_name] = self._form.decode("utf-8", "replace")


async def receive(request: Request, staging: Staging) -> dict[str, str]:
    """Stream the body into ``staging``; returns the form's fields. Raises ApiError, StoreError, ClientDisconnect."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise ApiError(
            "invalid_request", "send multipart/form-data with the adapter's files (see docs/API.md, or use `medley push`)"
        )
    parts = _Parts(staging)
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        async for chunk in chunks(request):
            await asyncio.to_thread(parser.write, chunk)
        parser.finalize()
    except FormParserError as error:
        raise ApiError("invalid_request", "the multipart body is malformed") from error
    return parts.fields
