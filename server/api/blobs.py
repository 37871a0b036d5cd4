"""Blobs: an adapter's files by the sha256 of their bytes, uploaded in pieces that survive a broken connection.

A tenant sees those that it uploaded itself or that its adapters hold; everybody else's are as if they did not exist.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import BinaryIO

from fastapi import APIRouter, Query
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from adapter_store.errors import BlobNotFound
from adapter_store.manifest import parse_blob_digest
from adapter_store.store import Store
from server.api.body import chunks
from server.errors import ApiError

router = APIRouter(prefix="/v1/blobs")
UPLOADS = "/v1/blobs/uploads/"
_CHUNK = 1 << 20


@router.post("/uploads", status_code=201)
async def begin(request: Request) -> JSONResponse:
    """Start the upload of one blob."""
    store: Store = request.app.state.services.store
    upload = await asyncio.to_thread(store.begin_blob, request.state.tenant)
    return JSONResponse(
        {"object": "blob.upload", "id": upload, "offset": 0}, 201, {"location": UPLOADS + upload, "upload-offset": "0"}
    )


@router.head("/uploads/{upload}")
async def offset(request: Request, upload: str) -> Response:
    """How much of it has arrived, in the header Upload-Offset."""
    store: Store = request.app.state.services.store
    return Response(headers={"upload-offset": str(await asyncio.to_thread(store.blob_offset, request.state.tenant, upload))})


@router.patch("/uploads/{upload}")
async def append(request: Request, upload: str) -> Response:
    """Append the body at the header Upload-Offset. What arrived before a connection broke counts."""
    store: Store = request.app.state.services.store
    given = request.headers.get("upload-offset", "")
    if not given.isascii() or not given.isdigit() or len(given) > 15:
        raise ApiError("invalid_request", "say in the header Upload-Offset where the body's bytes go", param="upload-offset")
    try:
        with await asyncio.to_thread(store.append_blob, request.state.tenant, upload, int(given)) as writer:
            async for chunk in chunks(request):
                await asyncio.to_thread(writer.write, chunk)
    except ClientDisconnect as error:
        raise ApiError("invalid_request", "the connection broke; ask for the offset and go on from there") from error
    return Response(status_code=204, headers={"upload-offset": str(writer.offset)})


@router.put("/uploads/{upload}", status_code=201)
async def finish(request: Request, upload: str, digest: str = Query(max_length=80)) -> JSONResponse:
    """All has arrived: check it against its digest and keep it."""
    store: Store = request.app.state.services.store
    sha256 = parse_blob_digest(digest)
    nbytes = await asyncio.to_thread(store.finish_blob, request.state.tenant, upload, sha256)
    return JSONResponse({"object": "blob", "digest": digest, "bytes": nbytes}, 201, {"location": f"/v1/blobs/{digest}"})


@router.delete("/uploads/{upload}")
async def cancel(request: Request, upload: str) -> dict[str, str]:
    """Forget what has arrived."""
    store: Store = request.app.state.services.store
    await asyncio.to_thread(store.cancel_blob, request.state.tenant, upload)
    return {"object": "blob.upload.deleted", "id": upload}


@router.head("/{digest}")
async def known(request: Request, digest: str) -> Response:
    """Whether the blob need not be sent again."""
    store: Store = request.app.state.services.store
    nbytes = await asyncio.to_thread(store.blob, request.state.tenant, parse_blob_digest(digest))
    if nbytes is None:
        raise BlobNotFound("you have no such blob")
    return Response(headers={"content-length": str(nbytes), "etag": f'"{digest}"'})


@router.get("/{digest}")
async def download(request: Request, digest: str) -> Response:
    """The blob's bytes."""
    return await blob_response(request, parse_blob_digest(digest))


async def blob_response(request: Request, sha256: str, filename: str | None = None) -> Response:
    """Stream a blob that the tenant owns. Raises ApiError."""
    store: Store = request.app.state.services.store
    file = await asyncio.to_thread(store.open_blob, request.state.tenant, sha256)
    headers = {"content-length": str(os.fstat(file.fileno()).st_size), "etag": f'"sha256:{sha256}"'}
    if filename is not None:
        headers["content-disposition"] = f'attachment; filename="{filename}"'
    return StreamingResponse(_pieces(file), media_type="application/octet-stream", headers=headers)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK):
            yield chunk
