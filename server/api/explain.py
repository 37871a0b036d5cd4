"""What happens to an adapter here: where its program is, what loading cost, when it was used, and whether it is pinned or in quarantine."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request

from adapter_store.store import Store
from adapter_store.types import AdapterVersion
from server.quarantine import Record


async def explain(request: Request, version: AdapterVersion) -> dict[str, Any]:
    """Facts of the version that a tenant's name means, beside those that never change. Raises ApiError."""
    services, tenant = request.app.state.services, request.state.tenant
    store: Store = services.store
    program_id = services.lowerer.program_id(version.digest)
    known = services.residents.of(program_id)
    refusal = services.quarantine.refusal(tenant, program_id)
    last_used = services.last_used.of(version)
    # The same bytes may be somebody else's adapter: whether they are loaded is shown only to who had them loaded.
    is_pinned = (tenant, version.digest) in await asyncio.to_thread(store.pins)
    is_own = is_pinned or last_used is not None or (known is not None and tenant in known.tenants)
    return {
        "residency": await services.holders(program_id) if is_own else {},
        "last_used": last_used,
        "load_seconds": known.load_seconds if is_own and known is not None else {},
        "pinned": is_pinned,
        "quarantine": None if refusal is None else _quarantine(refusal),
    }


def _quarantine(record: Record) -> dict[str, Any]:
    return {"code": record.code, "failures": record.failures, "at": record.at}
