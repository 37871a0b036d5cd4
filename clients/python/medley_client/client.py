"""The clients: ``Medley`` and, with ``await``, ``AsyncMedley``. Both only carry out what flows ask for (see ``flow``)."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import closing
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from medley_client import flow, wire
from medley_client.adapters import Adapters, AsyncAdapters
from medley_client.aliases import Aliases, AsyncAliases
from medley_client.errors import CannotConnect, ConnectionBroke
from medley_client.flow import Call, Done, Flow, Pause, Reply, Work, advance, read_error
from medley_client.types import AdapterChoice, Classified, Generated, Token

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT = httpx.Timeout(600.0, connect=5.0)


def _options(base_url: str | None, api_key: str | None, timeout: float | None) -> dict[str, Any]:
    key = api_key or os.environ.get("MEDLEY_API_KEY")
    return {
        "base_url": base_url or os.environ.get("MEDLEY_URL") or DEFAULT_URL,
        "headers": {"authorization": f"Bearer {key}"} if key else {},
        "timeout": TIMEOUT if timeout is None else httpx.Timeout(timeout, connect=5.0),
    }


def _unreachable(url: httpx.URL, error: httpx.TransportError) -> CannotConnect:
    kind = type(error).__name__
    if isinstance(error, (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)):
        return ConnectionBroke(f"the connection to {url} broke ({kind})")
    return CannotConnect(f"no server answers at {url} ({kind}); start one with `medley serve`, or set MEDLEY_URL")


def _content(call: Call) -> dict[str, Any]:
    """What httpx is told of a call, without a body that is streamed."""
    headers = {**call.headers, **(call.body.headers if call.body else {})}
    return {"params": call.params, "headers": headers, "json": call.json}


async def _each(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


class Medley:
    """A synchronous client. ``base_url`` and ``api_key`` default to MEDLEY_URL and MEDLEY_API_KEY; ``timeout`` is in seconds.

    Calls raise ApiError when the server refuses, and CannotConnect when nobody answers. Transient refusals are tried again.
    """

    def __init__(self, base_url: str | None = None, api_key: str | None = None, *, timeout: float | None = None) -> None:
        self._http = httpx.Client(**_options(base_url, api_key, timeout))
        self.adapters = Adapters(self.run, str(self._http.base_url))
        self.aliases = Aliases(self.run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def generate(self, prompt: str, *, adapter: AdapterChoice | None = None, **parameters: Any) -> Generated:
        """Text after a prompt. ``adapter`` is a name, or several names with weights; None is the base model.

        ``parameters`` are those of /generate (max_new_tokens, temperature, seed, stop, adapter_drop, …); with an alias, ``user`` chooses
        which of its adapters answers.
        """
        return wire.read_generated(self.request(wire.generate(prompt, adapter, False, parameters)))

    def generate_stream(self, prompt: str, *, adapter: AdapterChoice | None = None, **parameters: Any) -> Iterator[Token]:
        """The same, token by token. Closing the iterator ends the request."""
        call = wire.generate(prompt, adapter, True, parameters)
        try:
            with self._http.stream(call.method, call.path, json=call.json) as response:
                if response.is_error:
                    raise read_error(response.status_code, response.read().decode("utf-8", "replace"), response.headers)
                for line in response.iter_lines():
                    if (token := wire.read_event(line)) is not None:
                        yield token
        except httpx.TransportError as error:
            raise _unreachable(self._http.base_url, error) from error

    def chat(self, messages: list[dict[str, str]], *, adapter: AdapterChoice | None = None, **parameters: Any) -> str:
        """The assistant's answer to a conversation. ``parameters`` are those of /v1/chat/completions."""
        return str(self.request(wire.chat(messages, adapter, parameters))["choices"][0]["message"]["content"])

    def classify(
        self,
        inputs: Sequence[str],
        *,
        adapter: AdapterChoice | None = None,
        adapter_drop: int | None = None,
        user: str | None = None,
    ) -> list[Classified]:
        """What the adapter's classifier says of each text."""
        return wire.read_classified(self.request(wire.classify(inputs, adapter, adapter_drop, user)))

    def embed(
        self,
        inputs: Sequence[str],
        *,
        adapter: AdapterChoice | None = None,
        adapter_drop: int | None = None,
        user: str | None = None,
    ) -> list[list[float]]:
        """A vector of unit length for each text."""
        return wire.read_embedded(self.request(wire.embed(inputs, adapter, adapter_drop, user)))

    def models(self) -> list[str]:
        """Names that can be asked for: the base first, then the tenant's adapters."""
        return [item["id"] for item in self.request(Call("GET", "/v1/models"))["data"]]

    def request(self, call: Call) -> Any:
        """Send a call and return the reply's JSON. Raises ApiError and CannotConnect."""
        return self.run(flow.request(call))

    def run(self, work: Flow[T]) -> T:
        """Do what a flow asks for, and return what it returns. Raises MedleyError."""
        with closing(work):
            outcome: Any = None
            while not isinstance(step := advance(work, outcome), Done):
                outcome = self._do(step)
            return step.value

    def _do(self, step: Call | Pause | Work) -> Any:
        if isinstance(step, Work):
            return step.run()
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        try:
            return self._send(step)
        except httpx.TransportError as error:
            return _unreachable(self._http.base_url, error)

    def _send(self, call: Call) -> Reply:
        content = None if call.body is None else iter(call.body)
        with self._http.stream(call.method, call.path, content=content, **_content(call)) as response:
            if call.sink is None or response.is_error:
                return Reply(response.status_code, response.headers, response.read())
            call.sink.begin()
            for chunk in response.iter_bytes():
                call.sink.write(chunk)
            return Reply(response.status_code, response.headers)


class AsyncMedley:
    """``Medley`` with ``await`` and ``async for``."""

    def __init__(self, base_url: str | None = None, api_key: str | None = None, *, timeout: float | None = None) -> None:
        self._http = httpx.AsyncClient(**_options(base_url, api_key, timeout))
        self.adapters = AsyncAdapters(self.run, str(self._http.base_url))
        self.aliases = AsyncAliases(self.run)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def generate(self, prompt: str, *, adapter: AdapterChoice | None = None, **parameters: Any) -> Generated:
        return wire.read_generated(await self.request(wire.generate(prompt, adapter, False, parameters)))

    async def generate_stream(
        self, prompt: str, *, adapter: AdapterChoice | None = None, **parameters: Any
    ) -> AsyncIterator[Token]:
        call = wire.generate(prompt, adapter, True, parameters)
        try:
            async with self._http.stream(call.method, call.path, json=call.json) as response:
                if response.is_error:
                    raise read_error(response.status_code, (await response.aread()).decode("utf-8", "replace"), response.headers)
                async for line in response.aiter_lines():
                    if (token := wire.read_event(line)) is not None:
                        yield token
        except httpx.TransportError as error:
            raise _unreachable(self._http.base_url, error) from error

    async def chat(self, messages: list[dict[str, str]], *, adapter: AdapterChoice | None = None, **parameters: Any) -> str:
        return str((await self.request(wire.chat(messages, adapter, parameters)))["choices"][0]["message"]["content"])

    async def classify(
        self,
        inputs: Sequence[str],
        *,
        adapter: AdapterChoice | None = None,
        adapter_drop: int | None = None,
        user: str | None = None,
    ) -> list[Classified]:
        return wire.read_classified(await self.request(wire.classify(inputs, adapter, adapter_drop, user)))

    async def embed(
        self,
        inputs: Sequence[str],
        *,
        adapter: AdapterChoice | None = None,
        adapter_drop: int | None = None,
        user: str | None = None,
    ) -> list[list[float]]:
        return wire.read_embedded(await self.request(wire.embed(inputs, adapter, adapter_drop, user)))

    async def models(self) -> list[str]:
        return [item["id"] for item in (await self.request(Call("GET", "/v1/models")))["data"]]

    async def request(self, call: Call) -> Any:
        return await self.run(flow.request(call))

    async def run(self, work: Flow[T]) -> T:
        with closing(work):
            outcome: Any = None
            while not isinstance(step := advance(work, outcome), Done):
                outcome = await self._do(step)
            return step.value

    async def _do(self, step: Call | Pause | Work) -> Any:
        if isinstance(step, Work):
            return await asyncio.to_thread(step.run)
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        try:
            return await self._send(step)
        except httpx.TransportError as error:
            return _unreachable(self._http.base_url, error)

    async def _send(self, call: Call) -> Reply:
        content = None if call.body is None else _each(call.body)
        async with self._http.stream(call.method, call.path, content=content, **_content(call)) as response:
            if call.sink is None or response.is_error:
                return Reply(response.status_code, response.headers, await response.aread())
            call.sink.begin()
            async for chunk in response.aiter_bytes():
                call.sink.write(chunk)
            return Reply(response.status_code, response.headers)
