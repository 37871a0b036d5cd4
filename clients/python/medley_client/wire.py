"""Requests to the model as plain data: what to send, and how to read what comes back. No I/O, so that both clients share it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from medley_client.errors import ApiError
from medley_client.flow import Call
from medley_client.types import AdapterChoice, Classified, ClassifiedToken, Generated, Token


def generate(prompt: str, adapter: AdapterChoice | None, stream: bool, parameters: Mapping[str, Any]) -> Call:
    """``parameters`` are those of /generate; None values are left out."""
    chosen = _given(**parameters)
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


def classify(inputs: Sequence[str], adapter: AdapterChoice | None, drop: int | None = None, user: str | None = None) -> Call:
    return Call("POST", "/v1/classify", {**_model(adapter), **_given(adapter_drop=drop, user=user), "input": list(inputs)})


def embed(inputs: Sequence[str], adapter: AdapterChoice | None, drop: int | None = None, user: str | None = None) -> Call:
    return Call("POST", "/v1/embeddings", {**_model(adapter), **_given(adapter_drop=drop, user=user), "input": list(inputs)})


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


def _weighted(adapters: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"adapter": name, "weight": weight} for name, weight in adapters.items()]


def _model(adapter: AdapterChoice | None) -> dict[str, Any]:
    """How the routes under /v1 are told which adapters to use."""
    if adapter is None or isinstance(adapter, str):
        return {"model": adapter or "base"}
    return {"model": "base", "adapters": _weighted(adapter)}


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _token(item: Mapping[str, Any]) -> Token:
    return Token(item["id"], item["text"], item.get("logprob"), item.get("special", False))
