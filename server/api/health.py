"""Probes and metrics. Liveness is this process; readiness is the engine, and that the server is not stopping."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

router = APIRouter()


@router.get("/livez")
async def livez() -> dict[str, str]:
    """The event loop turns."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    """Requests can be served. 503 with the reason otherwise."""
    services = request.app.state.services
    if services.draining:
        return JSONResponse({"status": "draining"}, status_code=503, headers={"retry-after": "5"})
    if not services.engine.ready:
        return JSONResponse({"status": "engine not ready"}, status_code=503, headers={"retry-after": "2"})
    return JSONResponse({"status": "ok", "degraded": services.degraded})


@router.get("/health")
async def health(request: Request) -> JSONResponse:
    """What text-generation-inference and LoRAX clients ask for."""
    return await readyz(request)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text format."""
    return Response(request.app.state.services.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
