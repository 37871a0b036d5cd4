"""An upload's way from its bytes to a version: staged, checked, lowered and stored before it is acknowledged."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field, StringConstraints, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from adapter_store.manifest import NAME_GRAMMAR, check_name, check_tag, parse_blob_digest
from adapter_store.staging import StagedAdapter, Staging
from adapter_store.store import Store
from adapter_store.types import LATEST, AdapterVersion, Condition, Replay
from server.api.body import chunks
from server.api.conditions import idempotency_key, write_condition
from server.api.describe import describe
from server.api.multipart import MAX_PARTS, receive
from server.api.schemas import Strict
from server.errors import ADAPTER_ERRORS, ApiError, from_adapter_error

router = APIRouter(prefix="/v1/adapters")
MAX_MANIFEST_BYTES = 64 << 10

_FORM = {
    "type": "object",
    "required": ["files"],
    "properties": {
        "name": {"type": "string", "pattern": f"^{NAME_GRAMMAR}$"},
        "tag": {"type": "string"},
        "files": {"type": "array", "maxItems": MAX_PARTS, "items": {"type": "string", "format": "binary"}},
    },
}
"""The form that is read part by part, for the OpenAPI document."""


class Manifest(Strict):
    """An upload whose files are blobs that the tenant has: file name → ``sha256:…``."""

    name: str | None = None
    tag: str | None = None
    files: Annotated[
        dict[Annotated[str, StringConstraints(min_length=1, max_length=255)], Annotated[str, StringConstraints(max_length=80)]],
        Field(min_length=1, max_length=MAX_PARTS),
    ]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What becomes of an upload: the name, the tag that is moved, under which condition, and the key that makes it happen once."""

    name: str
    tag: str
    condition: Condition
    key: str | None


class InProgress:
    """Idempotency keys of requests that run now. Across replicas the catalog decides: one of two publishes, the other is told its reply."""

    def __init__(self) -> None:
        self._keys: set[tuple[str, str]] = set()

    @contextmanager
    def claim(self, tenant: str, key: str | None) -> Iterator[None]:
        """Raises ApiError while another request with this key runs."""
        if key is None:
            yield
            return
        if (tenant, key) in self._keys:
            raise ApiError("idempotency_key_in_use", "a request with this Idempotency-Key is running; wait for its reply")
        self._keys.add((tenant, key))
        try:
            yield
        finally:
            self._keys.discard((tenant, key))


@router.post(
    "",
    status_code=201,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": _FORM}, "application/json": {"schema": Manifest.model_json_schema()}},
        }
    },
)
async def push(
    request: Request, name: str | None = Query(default=None), tag: str | None = Query(default=None, max_length=64)
) -> Response:
    """Store an adapter under a name.

    Multipart: the files of an adapter's directory or one zip or tar, with fields ``name`` and ``tag`` (or query parameters). JSON: the same
    as blobs that were uploaded before.
    """
    metrics = request.app.state.services.metrics
    result = "error"
    try:
        condition, key = write_condition(request), idempotency_key(request)
        with request.app.state.services.pushes.claim(request.state.tenant, key):
            reply = await _push(request, name, tag, condition, key)
        result = "published"
        return reply
    except (ApiError, *ADAPTER_ERRORS) as error:
        refusal = error if isinstance(error, ApiError) else from_adapter_error(error)
        result = "refused" if refusal.row.status < 500 else "error"
        raise
    except ClientDisconnect as error:
        result = "aborted"
        raise ApiError("invalid_request", "the upload ended before all of it had arrived") from error
    finally:
        metrics.uploads.labels(result).inc()


async def _push(request: Request, name: str | None, tag: str | None, condition: Condition, key: str | None) -> Response:
    services, tenant = request.app.state.services, request.state.tenant
    store: Store = services.store
    staging = await asyncio.to_thread(store.begin_upload)
    try:
        fields = await _receive(request, staging)
        wanted = Wanted(_name(fields.get("name") or name), check_tag(fields.get("tag") or tag or LATEST), condition, key)
        staged = await asyncio.to_thread(staging.finish)
        # The key covers what was sent; what a fusion's names mean now is not part of it.
        if key is not None and (replay := await _replay(store, tenant, wanted, staged)) is not None:
            return replay
        staged = await asyncio.to_thread(store.with_children, tenant, staged)
        with services.lowerer.using(((staged.digest, 1.0),), since=time.monotonic()):
            program = await services.lowerer.ensure(tenant, staged.digest, lambda: nullcontext(staged.paths))
            nbytes, reply = await _commit(store, tenant, wanted, staged, program.facts)
            services.lowerer.keep(staged.digest)
    finally:
        # Large files take long to remove.
        await asyncio.to_thread(staging.discard)
    # Whoever pushes an adapter again wants it tried again.
    services.replica.release(tenant, staged.digest)
    services.metrics.upload_bytes.inc(nbytes)
    request.state.adapter = staged.digest
    return reply


async def _receive(request: Request, staging: Staging) -> dict[str, str]:
    """Fill the staging area; returns the fields that came with the files."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return await receive(request, staging)
    body = bytearray()
    async for chunk in chunks(request):
        body += chunk
        if len(body) > MAX_MANIFEST_BYTES:
            raise ApiError("body_too_large", f"the manifest is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = Manifest.model_validate_json(bytes(body))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ApiError("invalid_request", f"{where}: {first['msg']}"[:500], param=where[:80] or None) from error
    files = {name: parse_blob_digest(digest) for name, digest in manifest.files.items()}
    store: Store = request.app.state.services.store
    await asyncio.to_thread(store.stage_blobs, request.state.tenant, files, staging)
    return {key: value for key, value in (("name", manifest.name), ("tag", manifest.tag)) if value is not None}


def _name(name: str | None) -> str:
    if not name:
        message = "say what the adapter is to be called: form field, query parameter or JSON member `name`"
        raise ApiError("invalid_request", message, param="name")
    return check_name(name)


async def _replay(store: Store, tenant: str, wanted: Wanted, staged: StagedAdapter) -> Response | None:
    """The reply that the same request got before."""
    assert wanted.key is not None
    replay = await asyncio.to_thread(store.replay, tenant, wanted.key)
    return None if replay is None else _replayed(replay.to(store.fingerprint(wanted.name, staged, wanted.tag)))


def _replayed(replay: Replay) -> Response:
    return Response(replay.body, replay.status, {"idempotent-replayed": "true"}, media_type="application/json")


async def _commit(
    store: Store, tenant: str, wanted: Wanted, staged: StagedAdapter, facts: dict[str, Any]
) -> tuple[int, Response]:
    """What was stored, in bytes, and the reply: another replica's, if it published under the key meanwhile."""

    def reply(version: AdapterVersion) -> tuple[int, str]:
        return 201, json.dumps({**describe(version), "skipped": list(staged.skipped)})

    if wanted.key is None:
        commit = partial(store.commit, tag=wanted.tag, condition=wanted.condition)
        version = await asyncio.to_thread(commit, tenant, wanted.name, staged, facts)
        status, body = reply(version)
        return version.nbytes, Response(body, status, media_type="application/json")
    once = partial(store.commit_once, idempotency_key=wanted.key, reply=reply, tag=wanted.tag, condition=wanted.condition)
    done = await asyncio.to_thread(once, tenant, wanted.name, staged, facts)
    if isinstance(done, Replay):
        return 0, _replayed(done)
    status, body = reply(done)
    return done.nbytes, Response(body, status, media_type="application/json")
