"""Requests and replies as plain data: what to send, and how to read what comes back. No I/O, so that both clients share it."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medley_client.errors import ApiError, Fault
from medley_client.types import Adapter, AdapterChoice, Classified, ClassifiedToken, Generated, PushedAdapter, Token

RETRIES = 2
MAX_WAIT_S = 120.0
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request. ``path`` is relative to the server's address."""

    method: str
    path: str
    json: Any = None
    params: Mapping[str, str | int] | None = None


def generate(prompt: str, adapter: AdapterChoice | None, stream: bool, parameters: Mapping[str, Any]) -> Call:
    """``parameters`` are those of /generate; None values are left out."""
    chosen = {name: value for name, value in parameters.items() if value is not None}
    if isinstance(adapter, str):
        chosen["adapter_id"] = adapter
    elif adapter is not None:
        chosen["adapters"] = _weighted(adapter)
    if not stream:
        chosen["details"] = True
    return Call("POST", "/generate_stream" if stream else "/generate", {"inputs": prompt, "parameters": chosen})


def chat(messages: list[dict[str, str]], adapter: AdapterChoice | None, parameters: Mapping[str, Any]) -> Call:
    """``parameters`` are those of /v1/chat/completions."""
    return Call("POST", "/v1/chat/completions", {**_model(adapter), "messages": messages, **parameters})


def classify(inputs: Sequence[str], adapter: AdapterChoice | None, drop: int | None = None) -> Call:
    return Call("POST", "/v1/classify", {**_model(adapter), **_drop(drop), "input": list(inputs)})


def embed(inputs: Sequence[str], adapter: AdapterChoice | None, drop: int | None = None) -> Call:
    return Call("POST", "/v1/embeddings", {**_model(adapter), **_drop(drop), "input": list(inputs)})


def read_classified(body: Mapping[str, Any]) -> list[Classified]:
    return [
        Classified(
            label=item.get("label", ""),
            scores=dict(item.get("scores", {})),
            labels=tuple(item.get("labels", ())),
            tokens=tuple(
                ClassifiedToken(token["token"], token["label"], dict(token["scores"]), token.get("special", False))
                for token in item.get("tokens", ())
            ),
        )
        for item in body["data"]
    ]


def read_embedded(body: Mapping[str, Any]) -> list[list[float]]:
    return [list(item["embedding"]) for item in body["data"]]


def read_generated(body: Mapping[str, Any]) -> Generated:
    details = body.get("details") or {}
    return Generated(
        text=body["generated_text"],
        finish_reason=details.get("finish_reason", ""),
        prompt_tokens=details.get("prompt_tokens", 0),
        generated_tokens=details.get("generated_tokens", 0),
        tokens=tuple(_token(item) for item in details.get("tokens", ())),
    )


def read_event(line: str) -> Token | None:
    """One line of a stream: a token, or None for lines without one. Raises ApiError for an error event."""
    if not line.startswith("data:"):
        return None
    event = json.loads(line.removeprefix("data:"))
    if "error" in event:
        raise ApiError(str(event["error"]), status=200, code=str(event.get("code", "")))
    details = event.get("details") or {}
    token = event["token"]
    return Token(
        token["id"],
        token["text"],
        token.get("logprob"),
        token.get("special", False),
        event.get("generated_text"),
        details.get("finish_reason"),
    )


def read_adapter(body: Mapping[str, Any]) -> Adapter:
    versions = tuple(read_adapter(item) for item in body.get("versions", ()))
    return Adapter(**_adapter_fields(body), versions=versions, residency=dict(body.get("residency", {})))


def read_pushed(body: Mapping[str, Any]) -> PushedAdapter:
    return PushedAdapter(**_adapter_fields(body), skipped=tuple(body.get("skipped", ())))


def read_error(status: int, text: str, headers: Mapping[str, str]) -> ApiError:
    """An error reply in any of the server's shapes, or in that of something between."""
    request_id = headers.get("x-request-id")
    try:
        body = json.loads(text)
        error = body["error"]
    except (ValueError, KeyError, TypeError):
        return ApiError(f"the server answered {status}: {text[:200]}", status=status, code="", request_id=request_id)
    if isinstance(error, str):
        return ApiError(error, status=status, code=str(body.get("code", "")), request_id=request_id)
    known = Fault.__slots__
    faults = [Fault(**{name: fault.get(name) for name in known}) for fault in error.get("faults", ())]
    return ApiError(error.get("message", ""), status=status, code=error.get("code") or "", faults=faults, request_id=request_id)


def retry_wait(attempt: int, status: int, headers: Mapping[str, str]) -> float | None:
    """Seconds to wait before another try; None when there should be none. The server's hints win."""
    if attempt >= RETRIES or status not in _RETRIED or headers.get("x-should-retry") == "false":
        return None
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            wait = float(headers[name]) * scale
        except (KeyError, ValueError):
            continue
        return wait if 0 <= wait <= MAX_WAIT_S else None
    return float(min(8.0, 0.5 * 2**attempt) * random.uniform(0.75, 1.0))  # noqa: S311 - jitter


def _weighted(adapters: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"adapter": name, "weight": weight} for name, weight in adapters.items()]


def _model(adapter: AdapterChoice | None) -> dict[str, Any]:
    """How the routes under /v1 are told which adapters to use."""
    if adapter is None or isinstance(adapter, str):
        return {"model": adapter or "base"}
    return {"model": "base", "adapters": _weighted(adapter)}


def _drop(layers: int | None) -> dict[str, Any]:
    return {} if layers is None else {"adapter_drop": layers}


def _token(item: Mapping[str, Any]) -> Token:
    return Token(item["id"], item["text"], item.get("logprob"), item.get("special", False))


def _adapter_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": body["name"],
        "version": body["version"],
        "digest": body["digest"],
        "created": body["created"],
        "nbytes": body["bytes"],
        "facts": dict(body.get("facts", {})),
    }
