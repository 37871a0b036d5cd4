"""The composition root: builds every part from the settings, and the HTTP application over them. No module state anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from adapter_store.errors import StoreError
from adapter_store.residency import LocalResidency, ResidencyRegistry
from adapter_store.residency_redis import RedisResidency
from adapter_store.store import Store
from server import __version__
from server.adapters.lowerer import LowererClient
from server.api import adapters, generate, health, openai, tasks
from server.api.auth import Keys
from server.api.edge import TGI_PATHS, Edge, error_response
from server.api.generation import Generation
from server.config import Settings
from server.engine.base_dir import BaseDir, prepare_base
from server.engine.client import EngineClient
from server.engine.settings import EngineSettings
from server.engine.types import ProgramEvent
from server.errors import ApiError
from server.metrics import Metrics
from server.tokenizer import Tokenizer

LEASE_S = 10.0

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
    replica: str
    events: asyncio.Queue[ProgramEvent]
    started: float = field(default_factory=time.time)
    draining: bool = False
    degraded: set[str] = field(default_factory=set)

    @property
    def base_names(self) -> tuple[str, ...]:
        return (self.base.name, "base") if self.base.name != "base" else ("base",)

    async def holders(self, program_id: str) -> dict[str, str]:
        """Replicas that hold a program; empty while the registry does not answer."""
        try:
            return await self.registry.holders(program_id)
        except StoreError:
            return {}


def build_services(settings: Settings) -> Services:
    """Make every part; nothing is started. Raises UnsupportedBase, ConfigError, OSError."""
    base = prepare_base(settings.model, settings.data_dir, progress=log.info)
    dtype = pick_dtype(settings.dtype)
    events: asyncio.Queue[ProgramEvent] = asyncio.Queue()
    engine = EngineClient(_engine_settings(settings, base, dtype), on_event=events.put_nowait)
    metrics = Metrics(engine)
    store = Store.open(settings.data_dir / "store", max_upload_bytes=settings.max_upload_bytes)
    lowerer = LowererClient(
        base.path,
        base.digest,
        dtype,
        settings.data_dir / "programs",
        max_program_bytes=min(settings.bank_bytes, settings.host_bytes),
        max_disk_bytes=settings.disk_bytes,
        on_unused=_dropper(engine),
    )
    registry: ResidencyRegistry = LocalResidency() if settings.redis_url is None else RedisResidency(settings.redis_url)
    tokenizer = Tokenizer(base.path)
    return Services(
        settings=settings,
        base=base,
        store=store,
        registry=registry,
        engine=engine,
        lowerer=lowerer,
        generation=Generation(engine, store, lowerer, tokenizer, metrics, (base.name, "base")),
        metrics=metrics,
        keys=Keys(settings.keys_file),
        replica=f"{socket.gethostname()}-{os.getpid()}",
        events=events,
    )


def create_app(services: Services) -> FastAPI:
    """The application over built services. Starting and stopping it starts and stops them."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, services.store.close)
            stack.push_async_callback(services.registry.close)
            stack.push_async_callback(services.engine.stop)
            stack.push_async_callback(services.lowerer.stop)
            stored = await asyncio.to_thread(services.store.digests)
            await asyncio.gather(services.engine.start(), services.lowerer.start(stored))
            publisher = asyncio.create_task(_publish(services), name="residency-publisher")
            try:
                yield
            finally:
                publisher.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await publisher

    app = FastAPI(title="Medley", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.services = services
    for module in (generate, openai, tasks, adapters, health):
        app.include_router(module.router)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    app.add_middleware(Edge, keys=services.keys, metrics=services.metrics)
    return app


def _dropper(engine: EngineClient) -> Callable[[str], None]:
    """Has the engine free a program, from where nothing can be awaited."""
    under_way: set[asyncio.Task[None]] = set()

    def drop(program_id: str) -> None:
        task = asyncio.create_task(engine.drop_program(program_id))
        under_way.add(task)
        task.add_done_callback(under_way.discard)

    return drop


def pick_dtype(wanted: str) -> str:
    """``auto``: bfloat16 where the processor computes in it, float32 elsewhere."""
    if wanted != "auto":
        return wanted
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return "bfloat16" if "avx512_bf16" in file.read() else "float32"
    except OSError:
        return "float32"


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
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        bank_bytes=settings.bank_bytes,
        host_bytes=settings.host_bytes,
        threads=settings.threads,
        prefix_caching=settings.prefix_caching,
        kernel_dir=str(settings.data_dir / "kernels"),
    )


async def _publish(services: Services) -> None:
    """Tell the registry what the engine holds. A registry that does not answer makes the server degraded, never wrong."""
    restarts = services.engine.restarts
    forget = True
    while True:
        try:
            event = await asyncio.wait_for(services.events.get(), LEASE_S / 3)
        except TimeoutError:
            event = None
        if event is not None:
            services.metrics.program_event(event)
        if services.engine.restarts != restarts:
            restarts, forget = services.engine.restarts, True
        try:
            if forget:
                await services.registry.forget(services.replica)
                forget = False
            await services.registry.heartbeat(services.replica, LEASE_S)
            if event is not None:
                await services.registry.publish(services.replica, event.program_id, event.state.value, event.nbytes)
            services.degraded.discard("registry")
        except StoreError as error:
            services.degraded.add("registry")
            forget = True
            log.warning("the residency registry does not answer: %s", error)
        services.metrics.degraded.labels("registry").set(int("registry" in services.degraded))


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(request.url.path, error)


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
