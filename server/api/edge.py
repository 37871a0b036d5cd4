"""What every request passes before any route: request id, API key, encoding and size limits, and the access log.

A pure ASGI layer, so that streams pass through untouched. Deny by default: only the paths of ``OPEN_PATHS`` need no key.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from contextlib import ExitStack
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.auth import Keys
from server.api.blobs import UPLOADS
from server.errors import ApiError
from server.log import access
from server.metrics import Metrics

OPEN_PATHS = frozenset({"/livez", "/readyz"})
TGI_PATHS = frozenset({"/", "/generate", "/generate_stream"})
MAX_JSON_BYTES = 2 << 20
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

log = logging.getLogger("medley.access")


class Edge:
    """Wraps the application. ``scope["state"]`` then has ``tenant``, ``is_operator``, ``request_id``, and ``held``: what stays until all of the reply
    is sent."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
        state = scope.setdefault("state", {})
        state["request_id"], state["tenant"], state["is_operator"], state["held"] = request_id, "", False, ExitStack()
        status = 500

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            self._admit(scope, headers, state)
            await self._app(scope, receive if _is_upload(scope["path"]) else await _read(receive), tagged)
        except ApiError as error:
            await error_response(scope["path"], error)(scope, receive, tagged)
        finally:
            state["held"].close()
            self._record(scope, state, status, time.monotonic() - started)

    def _admit(self, scope: Scope, headers: dict[str, str], state: dict[str, Any]) -> None:
        if scope["path"] not in OPEN_PATHS:
            caller = self._keys.caller(headers.get("authorization"))
            state["tenant"], state["is_operator"] = caller.tenant, caller.is_operator
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError("unsupported_encoding", "compressed request bodies are not read; send the body plain")
        length = headers.get("content-length", "0")
        if not _is_upload(scope["path"]) and (not length.isdigit() or int(length) > MAX_JSON_BYTES):
            raise ApiError("body_too_large", f"the body is larger than {MAX_JSON_BYTES} bytes")

    def _record(self, scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
        # The route's template, not the path: ids in paths would make a series each.
        route = getattr(scope.get("route"), "path", "unmatched")
        outcome = "ok" if status < 400 else "refused" if status < 500 else "error"
        self._metrics.requests.labels(route, self._metrics.tenant(state["tenant"]), outcome).inc()
        self._metrics.duration.labels(route).observe(seconds)
        access(
            log,
            request_id=state["request_id"],
            tenant=state["tenant"],
            method=scope["method"],
            route=route,
            status=status,
            milliseconds=round(seconds * 1000, 1),
            adapter=state.get("adapter", ""),
        )


def error_response(path: str, error: ApiError) -> JSONResponse:
    """The error in the shape that the route's clients expect."""
    is_tgi = path in TGI_PATHS
    body = error.tgi_body() if is_tgi else error.openai_body()
    return JSONResponse(body, status_code=error.row.status, headers=error.headers)


def _is_upload(path: str) -> bool:
    """Whether the route reads the body itself, as it comes."""
    return path == "/v1/adapters" or path.startswith(UPLOADS)


async def _read(receive: Receive) -> Receive:
    """Read a body up to the limit, before anything else works on it. Returns a channel that repeats it."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return receive  # the caller has gone already
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_JSON_BYTES:
            raise ApiError("body_too_large", f"the body is larger than {MAX_JSON_BYTES} bytes")
    told = False

    async def repeat() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return repeat
