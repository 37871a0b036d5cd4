"""Uploading, listing and deleting adapters. An upload is stored, checked and lowered before it is acknowledged."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Any

from fastapi import APIRouter, Query
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from adapter_store.errors import StoreError
from adapter_store.manifest import NAME_GRAMMAR, check_name
from adapter_store.staging import Staging
from adapter_store.store import AdapterRecord, AdapterVersion
from server.adapters.faults import LoweringError
from server.adapters.turns import TooManyWaiting
from server.errors import ApiError, from_lowering_error, from_store_error, from_turns

router = APIRouter(prefix="/v1/adapters")
_MAX_PARTS = 64
_MAX_FIELD = 256


_FORM = {
    "type": "object",
    "required": ["files"],
    "properties": {
        "name": {"type": "string", "pattern": f"^{NAME_GRAMMAR}$"},
        "files": {"type": "array", "maxItems": _MAX_PARTS, "items": {"type": "string", "format": "binary"}},
    },
}
"""The form that is read part by part, for the OpenAPI document."""


@router.post(
    "",
    status_code=201,
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
)
async def push(request: Request, name: str | None = Query(default=None)) -> JSONResponse:
    """Multipart: field ``name`` (or the query parameter), and the files of an adapter's directory or one zip or tar."""
    services = request.app.state.services
    tenant = request.state.tenant
    result = "error"
    try:
        with services.store.begin_upload() as staging:
            name = await _receive(request, staging) or name
            if not name:
                raise ApiError(
                    "invalid_request", "say what the adapter is to be called: form field or query parameter `name`", param="name"
                )
            check_name(name)
            staged = await asyncio.to_thread(staging.finish)
            staged = await asyncio.to_thread(services.store.with_children, tenant, staged)
            program = await services.lowerer.ensure(tenant, staged.digest, nullcontext(staged.paths))
            version = await asyncio.to_thread(services.store.commit, tenant, name, staged, program.facts)
        result = "published"
        services.metrics.upload_bytes.inc(version.nbytes)
        request.state.adapter = version.digest
        return JSONResponse({**_describe(version), "skipped": list(staged.skipped)}, status_code=201)
    except StoreError as error:
        result = "refused"
        raise from_store_error(error) from error
    except LoweringError as error:
        result = "refused"
        raise from_lowering_error(error) from error
    except TooManyWaiting as error:
        result = "refused"
        raise from_turns(error) from error
    except ClientDisconnect as error:
        result = "aborted"
        raise ApiError("invalid_request", "the upload ended before all of it had arrived") from error
    finally:
        services.metrics.uploads.labels(result).inc()


@router.get("")
async def list_adapters(
    request: Request, limit: int = Query(default=100, ge=1, le=1000), after: str = Query(default="", max_length=64)
) -> dict[str, Any]:
    """The tenant's adapters by name; ``next`` is the ``after`` of the following page."""
    records = await asyncio.to_thread(request.app.state.services.store.records, request.state.tenant, limit, after)
    following = records[-1].name if len(records) == limit else None
    return {"object": "list", "data": [_describe(record.latest) for record in records], "next": following}


@router.get("/{name}")
async def show(request: Request, name: str) -> dict[str, Any]:
    """One adapter: facts, versions, and where its program is."""
    services = request.app.state.services
    try:
        record: AdapterRecord = await asyncio.to_thread(services.store.get, request.state.tenant, name)
    except StoreError as error:
        raise from_store_error(error) from error
    program_id = services.lowerer.program_id(record.latest.digest)
    return {
        **_describe(record.latest),
        "versions": [_describe(version) for version in record.versions],
        "residency": await services.holders(program_id),
    }


@router.delete("/{reference}")
async def delete(request: Request, reference: str) -> dict[str, Any]:
    """Remove a name, or one version of it. Requests under way finish; new ones get 404 at once."""
    services = request.app.state.services
    try:
        gone: list[AdapterVersion] = await asyncio.to_thread(services.store.delete, request.state.tenant, reference)
    except StoreError as error:
        raise from_store_error(error) from error
    for version in gone:
        # The same files may be somebody else's adapter, or this tenant's under another name.
        if not await asyncio.to_thread(services.store.has_digest, version.digest):
            for program_id in services.lowerer.forget(version.digest):
                await services.engine.drop_program(program_id)
    return {
        "object": "adapter.deleted",
        "deleted": [{"name": item.name, "version": f"v{item.number}", "digest": item.digest} for item in gone],
    }


def _describe(version: AdapterVersion) -> dict[str, Any]:
    return {
        "object": "adapter",
        "name": version.name,
        "version": f"v{version.number}",
        "digest": version.digest,
        "created": int(version.created),
        "bytes": version.nbytes,
        "facts": version.facts,
    }


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
        self.name: str | None = None

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
        if self._count > _MAX_PARTS:
            raise ApiError("invalid_request", f"the form has more than {_MAX_PARTS} parts")
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
        if self._form_name != "name":
            raise ApiError(
                "invalid_request",
                f"the form has an unknown field {self._form_name[:80]!r}; known: name, and files",
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
            self.name = self._form.decode("utf-8", "replace")


async def _receive(request: Request, staging: Staging) -> str | None:
    """Stream the body into ``staging``; returns the form's name field."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise ApiError(
            "invalid_request", "send multipart/form-data with the adapter's files (see docs/API.md, or use `medley push`)"
        )
    parts = _Parts(staging)
    try:
        parser = MultipartParser(boundary, parts.callbacks())  # type: ignore[arg-type]
        async for chunk in request.stream():
            if chunk:
                await asyncio.to_thread(parser.write, chunk)
        parser.finalize()
    except FormParserError as error:
        raise ApiError("invalid_request", "the multipart body is malformed") from error
    return parts.name
