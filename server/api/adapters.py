"""What a tenant has: listing, explaining, downloading and deleting adapters."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapter_store.errors import BlobNotFound
from adapter_store.store import Store
from server.api.blobs import blob_response
from server.api.conditions import is_known, quoted, write_condition
from server.api.describe import describe, describe_latest, describe_versions
from server.api.explain import explain

router = APIRouter(prefix="/v1/adapters")


@router.get("")
async def list_adapters(
    request: Request, limit: int = Query(default=100, ge=1, le=1000), after: str = Query(default="", max_length=64)
) -> dict[str, Any]:
    """The tenant's adapters by name; ``next`` is the ``after`` of the following page."""
    store: Store = request.app.state.services.store
    records = await asyncio.to_thread(store.records, request.state.tenant, limit, after)
    following = records[-1].name if len(records) == limit else None
    return {"object": "list", "data": [describe_latest(record) for record in records], "next": following}


@router.get("/{name}")
async def show(request: Request, name: str) -> Response:
    """One adapter: facts, versions and tags, where its program is, when it was used, and how long loading took."""
    services, tenant = request.app.state.services, request.state.tenant
    store: Store = services.store
    record = await asyncio.to_thread(store.get, tenant, name)
    if is_known(request, record.etag):
        return Response(status_code=304, headers={"etag": quoted(record.etag)})
    body = {
        **describe_latest(record),
        "versions": describe_versions(record),
        **await explain(request, record.latest),
    }
    return JSONResponse(body, headers={"etag": quoted(record.etag)})


@router.get("/{reference}/files")
async def files(request: Request, reference: str) -> dict[str, Any]:
    """What was uploaded: file names, digests and sizes."""
    store: Store = request.app.state.services.store
    version = await asyncio.to_thread(store.version, request.state.tenant, reference)
    shown = describe(version)
    return {"object": "list", "name": shown["name"], "version": shown["version"], "data": shown["files"]}


@router.get("/{reference}/files/{filename:path}")
async def download(request: Request, reference: str, filename: str) -> Response:
    """One of the files as it was uploaded."""
    store: Store = request.app.state.services.store
    version = await asyncio.to_thread(store.version, request.state.tenant, reference)
    found = next((file for file in version.files if file.name == filename), None)
    if found is None:
        held = ", ".join(file.name for file in version.files)
        raise BlobNotFound(f"{version.name}@v{version.number} has no file {filename[:80]!r}; it has {held}")
    return await blob_response(request, found.sha256, found.name)


@router.delete("/{reference}")
async def delete(request: Request, reference: str) -> dict[str, Any]:
    """Remove a name, or one version of it. Requests under way finish; new ones get 404 at once."""
    services = request.app.state.services
    store: Store = services.store
    gone = await asyncio.to_thread(store.delete, request.state.tenant, reference, write_condition(request))
    await services.replica.delete(sorted({version.digest for version in gone}))
    return {
        "object": "adapter.deleted",
        "deleted": [{"name": item.name, "version": f"v{item.number}", "digest": item.digest} for item in gone],
    }
