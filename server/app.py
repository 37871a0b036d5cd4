"""The composition root: builds every part from the settings, and the HTTP application over them. No module state anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from adapter_store.database import MAX_CONNECTIONS
from adapter_store.errors import StoreError
from adapter_store.residency import LocalResidency, ResidencyRegistry
from adapter_store.residency_redis import RedisResidency
from adapter_store.store import Store
from server import __version__
from server.adapters.lowerer import LowererClient
from server.api import adapters, aliases, blobs, generate, health, openai, push, registry, residency, tags, tasks
from server.api.auth import Keys
from server.api.edge import TGI_PATHS, Edge, error_response
from server.api.generation import Generation
from server.api.push import InProgress
from server.background import Background, endless
from server.config import Settings
from server.engine.base_dir import BaseDir, prepare_base
from server.engine.client import PINS_END_WITH, EngineClient
from server.engine.settings import EngineSettings
from server.engine.types import ProgramEvent, ProgramState
from server.errors import ADAPTER_ERRORS, ApiError, from_adapter_error
from server.last_used import LastUsed
from server.maintenance import maintain
from server.metrics import Metrics
from server.pins import Pins
from server.quarantine import Quarantine
from server.replica import Replica
from server.residents import Residents
from server.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Services:
    """What the routes work with; one per application."""

    settings: Settings
    base: BaseDir
    store: Store
    registry: ResidencyRegistry
    engine: EngineClient
    lowerer: LowererClient
    generation: Generation
    metrics: Metrics
    keys: Keys
    residents: Residents
    quarantine: Quarantine
    pins: Pins
    last_used: LastUsed
    replica: Replica
    pushes: InProgress = field(default_factory=InProgress)
    started: float = field(default_factory=time.time)
    draining: bool = False

    @property
    def degraded(self) -> list[str]:
        """Dependencies that do not answer, and without which serving goes on."""
        return ["registry"] if self.replica.is_degraded else []

    @property
    def base_names(self) -> tuple[str, ...]:
        return (self.base.name, "base") if self.base.name != "base" else ("base",)

    async def maintain(self) -> None:
        """Keep the store in order, until cancelled."""
        await maintain(self.store, self.last_used, self.pins)

    async def holders(self, program_id: str) -> dict[str, str]:
        """Replicas that hold a program, with its state. What this one holds is its own knowledge, which the registry learns a little later;
        while the registry does not answer, nothing is known of the others.
        """
        try:
            found = await self.registry.holders(program_id)
        except StoreError:
            found = {}
        found.pop(self.replica.name, None)
        own = self.residents.of(program_id)
        return found if own is None or own.state is ProgramState.STORED else {**found, self.replica.name: own.state.value}


def build_services(settings: Settings) -> Services:
    """Make every part; nothing is started. Raises UnsupportedBase, ConfigError, OSError."""
    base = prepare_base(settings.model, settings.data_dir, progress=log.info)
    dtype = pick_dtype(settings.dtype)

    def on_event(event: ProgramEvent) -> None:
        residents.apply(event)
        metrics.program_event(event)
        if event.reason in PINS_END_WITH:
            pins.refused(event.program_id)

    engine = EngineClient(_engine_settings(settings, base, dtype), on_event=on_event)
    residents, quarantine, metrics = Residents(lambda: engine.pid), Quarantine(), Metrics(engine)
    store = Store.open(
        settings.data_dir / "store",
        max_upload_bytes=settings.max_upload_bytes,
        catalog_url=settings.catalog_url,
        blobs_url=settings.blobs_url,
        blob_cache_bytes=settings.blob_cache_bytes,
    )
    background = Background()
    lowerer = LowererClient(
        base.path,
        base.digest,
        dtype,
        settings.data_dir / "programs",
        max_program_bytes=min(settings.bank_bytes, settings.host_bytes),
        max_disk_bytes=settings.disk_bytes,
        on_unused=lambda program_id: background.start(engine.drop_program(program_id)),
    )
    shared: ResidencyRegistry = LocalResidency() if settings.redis_url is None else RedisResidency(settings.redis_url)
    pins, last_used = Pins(store, lowerer, engine), LastUsed(store)
    replica = Replica(f"{socket.gethostname()}-{os.getpid()}", shared, residents, store, lowerer, engine, pins, quarantine)
    metrics.quarantined.set_function(lambda: len(quarantine))
    metrics.degraded.labels("registry").set_function(lambda: int(replica.is_degraded))
    tokenizer = Tokenizer(base.path)
    return Services(
        settings=settings,
        base=base,
        store=store,
        registry=shared,
        engine=engine,
        lowerer=lowerer,
        generation=Generation(engine, store, lowerer, tokenizer, metrics, residents, quarantine, last_used, (base.name, "base")),
        metrics=metrics,
        keys=Keys(settings.keys_file),
        residents=residents,
        quarantine=quarantine,
        pins=pins,
        last_used=last_used,
        replica=replica,
    )


def create_app(services: Services) -> FastAPI:
    """The application over built services. Starting and stopping it starts and stops them."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Requests ask the catalog in threads; a few that wait for slow disks must not keep the others.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(MAX_CONNECTIONS, thread_name_prefix="http"))
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, services.store.close)
            stack.push_async_callback(services.registry.close)
            stack.push_async_callback(services.engine.stop)
            stack.push_async_callback(services.lowerer.stop)
            stored = await asyncio.to_thread(services.store.digests)
            await asyncio.gather(services.engine.start(), services.lowerer.start(stored))
            await services.pins.sync()
            for work in (services.replica.publish, services.replica.follow, services.maintain):
                await stack.enter_async_context(endless(work()))
            yield

    app = FastAPI(title="Medley", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.services = services
    for module in (generate, openai, tasks, push, adapters, tags, aliases, blobs, residency, registry, health):
        app.include_router(module.router)
    app.add_exception_handler(ApiError, _on_api_error)
    for kind in ADAPTER_ERRORS:
        app.add_exception_handler(kind, _on_adapter_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(Edge, keys=services.keys, metrics=services.metrics)
    return app


def pick_dtype(wanted: str) -> str:
    """``auto``: bfloat16 where the processor computes in it, float32 elsewhere."""
    if wanted != "auto":
        return wanted
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return "bfloat16" if "avx512_bf16" in file.read() else "float32"
    except OSError:
        return "float32"


def _step_target_ms(settings: Settings) -> int:
    """A CPU needs about 2 ms for each of a prompt's tokens, so that shorter steps would cut prompts into slivers."""
    if settings.step_target_ms is not None:
        return settings.step_target_ms
    return 250 if settings.device == "cpu" else 50


def _engine_settings(settings: Settings, base: BaseDir, dtype: str) -> EngineSettings:
    return EngineSettings(
        model_dir=str(base.path),
        base_digest=base.digest,
        model_name=base.name,
        dtype=dtype,
        device=settings.device,
        max_model_len=settings.max_model_len,
        kv_cache_bytes=settings.kv_cache_bytes,
        max_batch_tokens=settings.max_batch_tokens,
        step_target_s=_step_target_ms(settings) / 1000,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        bank_bytes=settings.bank_bytes,
        host_bytes=settings.host_bytes,
        threads=settings.threads,
        prefix_caching=settings.prefix_caching,
        kernel_dir=str(settings.data_dir / "kernels"),
    )


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(request.url.path, error)


async def _on_adapter_error(request: Request, error: Exception) -> Response:
    return error_response(request.url.path, from_adapter_error(error))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    """The first fault decides ``param``; the message has them all."""
    assert isinstance(error, RequestValidationError)
    faults = [_fault(item) for item in error.errors()[:16]]
    code = "validation" if request.url.path in TGI_PATHS else "invalid_request"
    message = "; ".join(dict.fromkeys(f"{where}: {text}" if where else text for where, text in faults))
    return error_response(request.url.path, ApiError(code, message[:2000], param=faults[0][0] or None))


def _fault(item: Any) -> tuple[str, str]:
    where = ".".join(str(part) for part in item["loc"] if part not in ("body", "query", "path"))
    text = "unknown field" if item["type"] == "extra_forbidden" else str(item["msg"])
    return where[:120], text[:300]


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed"}
    code = codes.get(error.status_code, "invalid_request" if error.status_code < 500 else "internal_error")
    return error_response(request.url.path, ApiError(code, str(error.detail)))


async def _on_bug(request: Request, error: Exception) -> Response:
    log.error("unhandled error in request %s", request.state.request_id, exc_info=error)
    return error_response(
        request.url.path, ApiError("internal_error", f"the server failed on this request ({request.state.request_id})")
    )
