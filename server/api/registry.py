"""``GET /v1/registry``: the server as a whole, for operators. Which replicas are alive, what they hold, and whose adapters that is."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from adapter_store.errors import StoreUnavailable
from adapter_store.residency import ResidencyRegistry
from adapter_store.types import AdapterVersion
from server.engine.client import EngineClient
from server.errors import ApiError
from server.residents import Resident

router = APIRouter(prefix="/v1/registry")


@router.get("")
async def show(request: Request) -> dict[str, Any]:
    """All replicas as the registry knows them, and this one's engine as it is. Without the registry, ``replicas`` is empty."""
    if not request.state.is_operator:
        raise ApiError(
            "operator_only",
            "this route needs an operator's key; make one with `python -m server.api.auth new TENANT --file KEYS --operator`",
        )
    services = request.app.state.services
    residents: list[Resident] = list(services.residents)
    digests = {digest for item in residents for digest in item.digests}
    names = await asyncio.to_thread(services.store.names_of, digests)
    return {
        "object": "registry",
        "replica": services.replica.name,
        "degraded": services.degraded,
        "replicas": await _replicas(services.registry),
        "engine": _engine(services.engine),
        "programs": [_program(item, names) for item in residents],
        "quarantined": len(services.quarantine),
    }


async def _replicas(registry: ResidencyRegistry) -> list[dict[str, Any]]:
    try:
        leases, replicas = await registry.leases(), await registry.replicas()
    except StoreUnavailable:
        return []
    return [
        {"replica": replica, "lease_seconds": round(leases[replica], 3), "programs": replicas[replica]}
        for replica in sorted(leases.keys() & replicas.keys())
    ]


def _engine(engine: EngineClient) -> dict[str, Any]:
    """Counters only grow while the engine's process lives; restarting it starts them anew."""
    stats = engine.stats
    return {
        "ready": engine.ready,
        "restarts": engine.restarts,
        "slots": {"total": stats.slots_total, "used": stats.slots_used, "pinned": stats.slots_pinned},
        "device_bytes": {"total": stats.bank_bytes_total, "used": stats.bank_bytes_used},
        "host_bytes": {"used": stats.host_bytes_used},
        "counters": stats.counters,
    }


def _program(item: Resident, names: Mapping[str, Sequence[AdapterVersion]]) -> dict[str, Any]:
    """A program and its adapters by all the names that they have; an adapter that was deleted has none."""
    return {
        "program": item.program_id,
        "state": item.state.value,
        "since": item.since,
        "bytes": item.nbytes,
        "last_used": item.last_used,
        "loads": item.loads,
        "admissions": item.admissions,
        "evictions": item.evictions,
        "failures": item.failures,
        "load_seconds": item.load_seconds,
        "adapters": [
            {
                "digest": digest,
                "names": [
                    {"tenant": version.tenant, "name": version.name, "version": f"v{version.number}"}
                    for version in names.get(digest, ())
                ],
            }
            for digest in item.digests
        ],
    }
