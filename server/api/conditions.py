"""The headers by which a caller says under which conditions a write may happen: If-Match, If-None-Match and Idempotency-Key."""

from __future__ import annotations

import re

from starlette.requests import Request

from adapter_store.types import Condition
from server.errors import ApiError

_ETAG = re.compile(r'"([A-Za-z0-9._:-]{1,128})"')
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


def quoted(etag: str) -> str:
    """An etag as headers carry it."""
    return f'"{etag}"'


def write_condition(request: Request) -> Condition:
    """What If-Match and If-None-Match ask of a write. Raises ApiError for anything but one etag, or ``*`` for "not there yet"."""
    match, none_match = request.headers.get("if-match"), request.headers.get("if-none-match")
    if none_match not in (None, "*"):
        raise ApiError(
            "invalid_request", "If-None-Match of a write must be *: only if the name does not exist", param="if-none-match"
        )
    if match is None:
        return Condition(absent=none_match == "*")
    if match.strip() == "*" and none_match is None:
        return Condition(match="*")
    found = _ETAG.fullmatch(match.strip())
    if found is None or none_match is not None:
        raise ApiError(
            "invalid_request", "If-Match must be one etag in quotes, as in the ETag header, and come alone", param="if-match"
        )
    return Condition(match=found[1])


def is_known(request: Request, etag: str) -> bool:
    """Whether the caller of a read has this state already."""
    return quoted(etag) in (item.strip().removeprefix("W/") for item in request.headers.get("if-none-match", "").split(","))


def idempotency_key(request: Request) -> str | None:
    """The key under which the reply is kept, if the caller sent one. Raises ApiError."""
    key = request.headers.get("idempotency-key")
    if key is not None and not _KEY.fullmatch(key):
        raise ApiError("invalid_request", "Idempotency-Key must be 1 to 255 visible ASCII characters", param="idempotency-key")
    return key
