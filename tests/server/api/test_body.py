"""Bodies that stop coming."""

from __future__ import annotations

import asyncio

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message

from server.api.body import chunks
from server.errors import ApiError


def request(*messages: Message) -> Request:
    """One whose body comes in these pieces, and then no more."""
    left = list(messages)

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    return Request({"type": "http", "method": "PATCH", "headers": []}, receive)


def piece(body: bytes, more: bool = True) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


async def test_pieces_come_as_they_are() -> None:
    body = request(piece(b"ab"), piece(b""), piece(b"c", more=False))
    assert [chunk async for chunk in chunks(body)] == [b"ab", b"c"]


async def read(body: Request, found: list[bytes]) -> None:
    async for chunk in chunks(body, silence_s=0.05):
        found.append(chunk)


async def test_silence_and_a_lost_connection_are_told_apart() -> None:
    found: list[bytes] = []
    with pytest.raises(ApiError) as caught:
        await read(request(piece(b"ab")), found)
    assert (found, caught.value.row.code, caught.value.row.status) == ([b"ab"], "upload_stalled", 408)
    with pytest.raises(ClientDisconnect):
        await read(request(piece(b"c"), {"type": "http.disconnect"}), found)
    assert found == [b"ab", b"c"], "what came counts"
