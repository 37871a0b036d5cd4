"""Bringing adapters to memory before they are asked for, and keeping them there."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from adapter_store.store import Store
from adapter_store.types import AdapterVersion
from server.api.describe import describe
from server.api.explain import explain
from server.program_ref import program_ref

router = APIRouter(prefix="/v1/adapters/{reference}")


@router.post("/load", status_code=202)
async def load(request: Request, reference: str) -> dict[str, Any]:
    """Begin to load a version; the reply does not wait for it. An adapter in quarantine gets another chance."""
    services, tenant, since = request.app.state.services, request.state.tenant, time.monotonic()
    store: Store = services.store
    version = await asyncio.to_thread(store.version, tenant, reference)
    with services.lowerer.using(((version.digest, 1.0),), since=since):
        program = await services.lowerer.ensure(tenant, version.digest, partial(store.checkout, version))
        services.replica.release(tenant, version.digest)
        services.residents.asked(program.program_id, (version.digest,), tenant)
        await services.engine.load_program(program_ref(program))
    return {**describe(version), **await explain(request, version)}


@router.post("/pin")
async def pin(request: Request, reference: str) -> dict[str, Any]:
    """Keep a version on the device. It is that version that stays, whatever the name means later."""
    return await _change(request, reference, request.app.state.services.pins.pin)


@router.delete("/pin")
async def unpin(request: Request, reference: str) -> dict[str, Any]:
    """Let a version go like any other."""
    return await _change(request, reference, request.app.state.services.pins.unpin)


async def _change(request: Request, reference: str, change: Callable[[AdapterVersion], Awaitable[None]]) -> dict[str, Any]:
    """Pin or unpin a version, here and on the other replicas."""
    services = request.app.state.services
    store: Store = services.store
    version = await asyncio.to_thread(store.version, request.state.tenant, reference)
    await change(version)
    services.replica.tell_pins()
    return {**describe(version), **await explain(request, version)}
