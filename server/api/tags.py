"""Tags: names for single versions of an adapter. ``latest`` is what the bare name means; moving it back is a rollback."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import StringConstraints
from starlette.requests import Request
from starlette.responses import JSONResponse

from adapter_store.store import Store
from adapter_store.types import AdapterRecord
from server.api.conditions import quoted, write_condition
from server.api.schemas import Strict

router = APIRouter(prefix="/v1/adapters/{name}/tags")


class TagBody(Strict):
    """``PUT …/tags/{tag}``. ``version``: ``v3``, ``sha256:…`` or another tag."""

    version: Annotated[str, StringConstraints(min_length=1, max_length=80)]


@router.get("")
async def list_tags(request: Request, name: str) -> JSONResponse:
    """All tags of an adapter."""
    store: Store = request.app.state.services.store
    return _reply(await asyncio.to_thread(store.get, request.state.tenant, name))


@router.put("/{tag}")
async def put(request: Request, name: str, tag: str, body: TagBody) -> JSONResponse:
    """Make a tag name another version, at once."""
    store: Store = request.app.state.services.store
    return _reply(await asyncio.to_thread(store.set_tag, request.state.tenant, name, tag, body.version, write_condition(request)))


@router.delete("/{tag}")
async def remove(request: Request, name: str, tag: str) -> dict[str, Any]:
    """Forget a tag; the version that it names stays."""
    store: Store = request.app.state.services.store
    await asyncio.to_thread(store.remove_tag, request.state.tenant, name, tag, write_condition(request))
    return {"object": "tag.deleted", "name": name, "tag": tag}


def _reply(record: AdapterRecord) -> JSONResponse:
    tags = {tag: f"v{number}" for tag, number in sorted(record.tags.items())}
    return JSONResponse({"object": "tags", "name": record.name, "tags": tags}, headers={"etag": quoted(record.etag)})
