"""Calls of the store from routes: in a thread, and with errors as the caller should see them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from adapter_store.errors import StoreError
from server.errors import from_store_error

P = ParamSpec("P")
T = TypeVar("T")


async def stored(call: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """What the call returns. Raises ApiError."""
    try:
        return await asyncio.to_thread(call, *arguments, **named)
    except StoreError as error:
        raise from_store_error(error) from error
