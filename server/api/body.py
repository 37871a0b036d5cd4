"""Bodies that are read as they come, for as long as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import Request

from server.errors import ApiError

SILENCE_S = 60.0
"""A sender that is gone without saying so must not keep what its upload holds."""


async def chunks(request: Request, silence_s: float = SILENCE_S) -> AsyncIterator[bytes]:
    """The body's pieces. Raises ApiError after so many seconds without one, and ClientDisconnect."""
    stream = request.stream()
    while True:
        try:
            async with asyncio.timeout(silence_s):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise ApiError("upload_stalled", f"nothing has arrived for {silence_s:.0f} s; send the rest again") from error
        if chunk:
            yield chunk
