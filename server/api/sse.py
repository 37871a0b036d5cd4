"""Server-sent events. An error in the middle of a stream is an event of its own, after which the stream ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import StreamingResponse

from server.errors import ApiError

DONE = b"data: [DONE]\n\n"
_ENCODER = msgspec.json.Encoder()


def event(data: dict[str, Any]) -> bytes:
    return b"data: %b\n\n" % _ENCODER.encode(data)


async def respond(
    events: AsyncIterator[dict[str, Any]], render_error: Callable[[ApiError], dict[str, Any]], *, done: bool
) -> StreamingResponse:
    """Stream events as they come. The first one is awaited here, so that an early failure still gets its status code."""
    try:
        first = await anext(events)
    except StopAsyncIteration:
        first = None

    async def body() -> AsyncIterator[bytes]:
        async with aclosing(events) as rest:  # type: ignore[type-var]
            try:
                if first is not None:
                    yield event(first)
                async for item in rest:
                    yield event(item)
            except ApiError as error:
                yield event(render_error(error))
            if done:
                yield DONE

    return StreamingResponse(
        body(), media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
    )
