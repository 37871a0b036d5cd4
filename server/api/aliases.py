"""Aliases: names that mean one adapter version, or several with weights. A user always gets the same one."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse

from adapter_store.aliases import MAX_TARGETS
from adapter_store.store import Store
from adapter_store.types import Alias, Target
from server.api.conditions import quoted, write_condition
from server.api.schemas import AdapterReference, Strict

router = APIRouter(prefix="/v1/aliases")


class WeightedTarget(Strict):
    """One of an alias's meanings. It gets ``weight / sum of weights`` of the users."""

    adapter: AdapterReference
    weight: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0


class AliasBody(Strict):
    """``PUT /v1/aliases/{name}``."""

    targets: Annotated[list[WeightedTarget], Field(min_length=1, max_length=MAX_TARGETS)]


@router.get("")
async def list_aliases(
    request: Request, limit: int = Query(default=100, ge=1, le=1000), after: str = Query(default="", max_length=64)
) -> dict[str, Any]:
    """The tenant's aliases by name; ``next`` is the ``after`` of the following page."""
    store: Store = request.app.state.services.store
    found = await asyncio.to_thread(store.aliases, request.state.tenant, limit, after)
    return {
        "object": "list",
        "data": [_describe(item) for item in found],
        "next": found[-1].name if len(found) == limit else None,
    }


@router.get("/{name}")
async def show(request: Request, name: str) -> JSONResponse:
    """What an alias means now."""
    store: Store = request.app.state.services.store
    return _reply(await asyncio.to_thread(store.alias, request.state.tenant, name))


@router.put("/{name}")
async def put(request: Request, name: str, body: AliasBody) -> JSONResponse:
    """Make the name mean this, at once and as a whole."""
    targets = tuple(Target(item.adapter, item.weight) for item in body.targets)
    store: Store = request.app.state.services.store
    return _reply(await asyncio.to_thread(store.set_alias, request.state.tenant, name, targets, write_condition(request)))


@router.delete("/{name}")
async def remove(request: Request, name: str) -> dict[str, Any]:
    """Forget an alias; what it meant stays."""
    store: Store = request.app.state.services.store
    await asyncio.to_thread(store.remove_alias, request.state.tenant, name, write_condition(request))
    return {"object": "alias.deleted", "name": name}


def _reply(alias: Alias) -> JSONResponse:
    return JSONResponse(_describe(alias), headers={"etag": quoted(alias.etag)})


def _describe(alias: Alias) -> dict[str, Any]:
    targets = [{"adapter": target.reference, "weight": target.weight} for target in alias.targets]
    return {"object": "alias", "name": alias.name, "targets": targets, "etag": alias.etag}
