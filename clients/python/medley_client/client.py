"""The clients: ``Medley`` and, with ``await``, ``AsyncMedley``. Both only carry what ``wire`` and ``upload`` make and read."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from medley_client import wire
from medley_client.errors import CannotConnect
from medley_client.types import Adapter, AdapterChoice, Classified, Generated, PushedAdapter, Token
from medley_client.upload import Progress, Upload, find_files

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
    return CannotConnect(f"no server answers at {url} ({type(error).__name__}); start one with `medley serve`, or set MEDLEY_URL")


class Medley:
    """A synchronous client. ``base_url`` and ``api_key`` default to MEDLEY_URL and MEDLEY_API_KEY; ``timeout`` is in seconds.

    Calls raise ApiError when the server refuses, and CannotConnect when nobody answers. Transient refusals are tried again.
    """

    def __init__(self, base_url: str | None = None, api_key: str | None = None, *, timeout: float | None = None) -> None:
        self._http = httpx.Client(**_options(base_url, api_key, timeout))
        self.adapters = Adapters(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def generate(self, prompt: str, *, adapter: AdapterChoice | None = None, **parameters: Any) -> Generated:
        """Text after a prompt. ``adapter`` is a name, or several names with weights; None is the base model.

        ``parameters`` are those of /generate (max_new_tokens, temperature, seed, stop, adapter_drop, …).
        """
        return wire.read_generated(self.request(wire.generate(prompt, adapter, False, parameters)))

    def generate_stream(self, prompt: str, *, adapter: AdapterChoice | None = None, **parameters: Any) -> Iterator[Token]:
        """The same, token by token. Closing the iterator ends the request."""
        call = wire.generate(prompt, adapter, True, parameters)
        try:
            with self._http.stream(call.method, call.path, json=call.json) as response:
                if response.is_error:
                    raise wire.read_error(response.status_code, response.read().decode("utf-8", "replace"), response.headers)
                for line in response.iter_lines():
                    if (token := wire.read_event(line)) is not None:
                        yield token
        except httpx.TransportError as error:
            raise _unreachable(self._http.base_url, error) from error

    def chat(self, messages: list[dict[str, str]], *, adapter: AdapterChoice | None = None, **parameters: Any) -> str:
        """The assistant's answer to a conversation. ``parameters`` are those of /v1/chat/completions."""
        return str(self.request(wire.chat(messages, adapter, parameters))["choices"][0]["message"]["content"])

    def classify(
        self, inputs: Sequence[str], *, adapter: AdapterChoice | None = None, adapter_drop: int | None = None
    ) -> list[Classified]:
        """What the adapter's classifier says of each text."""
        return wire.read_classified(self.request(wire.classify(inputs, adapter, adapter_drop)))

    def embed(
        self, inputs: Sequence[str], *, adapter: AdapterChoice | None = None, adapter_drop: int | None = None
    ) -> list[list[float]]:
        """A vector of unit length for each text."""
        return wire.read_embedded(self.request(wire.embed(inputs, adapter, adapter_drop)))

    def models(self) -> list[str]:
        """Names that can be asked for: the base first, then the tenant's adapters."""
        return [item["id"] for item in self.request(wire.Call("GET", "/v1/models"))["data"]]

    def request(self, call: wire.Call, upload: Upload | None = None) -> Any:
        """Send a call and return the reply's JSON. Raises ApiError and CannotConnect."""
        attempt = 0
        while True:
            sent: dict[str, Any] = {"json": call.json} if upload is None else {"content": iter(upload), "headers": upload.headers}
            try:
                response = self._http.request(call.method, call.path, params=call.params, **sent)
            except httpx.TransportError as error:
                raise _unreachable(self._http.base_url, error) from error
            if not response.is_error:
                return response.json()
            wait = wire.retry_wait(attempt, response.status_code, response.headers)
            if wait is None:
                raise wire.read_error(response.status_code, response.text, response.headers)
            attempt += 1
            time.sleep(wait)


class Adapters:
    """The tenant's adapters on the server."""

    def __init__(self, client: Medley) -> None:
        self._client = client

    def push(
        self, source: str | Path, name: str, *, rank: int | None = None, exact: bool = False, progress: Progress | None = None
    ) -> PushedAdapter:
        """Upload an adapter directory, or a zip or tar of one; or a fine-tuned model with ``rank`` or ``exact`` (see ``find_files``)."""
        files = find_files(Path(source), rank=rank, exact=exact)
        return wire.read_pushed(self._client.request(wire.Call("POST", "/v1/adapters"), Upload(files, name, progress)))

    def list(self) -> list[Adapter]:
        """All adapters, by name."""
        found: list[Adapter] = []
        after: str | None = ""
        while after is not None:
            page = self._client.request(wire.Call("GET", "/v1/adapters", params={"limit": 1000, "after": after}))
            found += [wire.read_adapter(item) for item in page["data"]]
            after = page["next"]
        return found

    def show(self, name: str) -> Adapter:
        return wire.read_adapter(self._client.request(wire.Call("GET", f"/v1/adapters/{name}")))

    def delete(self, reference: str) -> int:
        """Remove a name, or one version of it (``name@v2``). Returns how many versions went."""
        return len(self._client.request(wire.Call("DELETE", f"/v1/adapters/{reference}"))["deleted"])


class AsyncMedley:
    """``Medley`` with ``await`` and ``async for``."""

    def __init__(self, base_url: str | None = None, api_key: str | None = None, *, timeout: float | None = None) -> None:
        self._http = httpx.AsyncClient(**_options(base_url, api_key, timeout))
        self.adapters = AsyncAdapters(self)

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
                    raise wire.read_error(
                        response.status_code, (await response.aread()).decode("utf-8", "replace"), response.headers
                    )
                async for line in response.aiter_lines():
                    if (token := wire.read_event(line)) is not None:
                        yield token
        except httpx.TransportError as error:
            raise _unreachable(self._http.base_url, error) from error

    async def chat(self, messages: list[dict[str, str]], *, adapter: AdapterChoice | None = None, **parameters: Any) -> str:
        return str((await self.request(wire.chat(messages, adapter, parameters)))["choices"][0]["message"]["content"])

    async def classify(
        self, inputs: Sequence[str], *, adapter: AdapterChoice | None = None, adapter_drop: int | None = None
    ) -> list[Classified]:
        return wire.read_classified(await self.request(wire.classify(inputs, adapter, adapter_drop)))

    async def embed(
        self, inputs: Sequence[str], *, adapter: AdapterChoice | None = None, adapter_drop: int | None = None
    ) -> list[list[float]]:
        return wire.read_embedded(await self.request(wire.embed(inputs, adapter, adapter_drop)))

    async def models(self) -> list[str]:
        return [item["id"] for item in (await self.request(wire.Call("GET", "/v1/models")))["data"]]

    async def request(self, call: wire.Call, upload: Upload | None = None) -> Any:
        attempt = 0
        while True:
            sent: dict[str, Any] = (
                {"json": call.json} if upload is None else {"content": upload.stream(), "headers": upload.headers}
            )
            try:
                response = await self._http.request(call.method, call.path, params=call.params, **sent)
            except httpx.TransportError as error:
                raise _unreachable(self._http.base_url, error) from error
            if not response.is_error:
                return response.json()
            wait = wire.retry_wait(attempt, response.status_code, response.headers)
            if wait is None:
                raise wire.read_error(response.status_code, response.text, response.headers)
            attempt += 1
            await asyncio.sleep(wait)


class AsyncAdapters:
    """The tenant's adapters on the server."""

    def __init__(self, client: AsyncMedley) -> None:
        self._client = client

    async def push(
        self, source: str | Path, name: str, *, rank: int | None = None, exact: bool = False, progress: Progress | None = None
    ) -> PushedAdapter:
        files = find_files(Path(source), rank=rank, exact=exact)
        return wire.read_pushed(await self._client.request(wire.Call("POST", "/v1/adapters"), Upload(files, name, progress)))

    async def list(self) -> list[Adapter]:
        found: list[Adapter] = []
        after: str | None = ""
        while after is not None:
            page = await self._client.request(wire.Call("GET", "/v1/adapters", params={"limit": 1000, "after": after}))
            found += [wire.read_adapter(item) for item in page["data"]]
            after = page["next"]
        return found

    async def show(self, name: str) -> Adapter:
        return wire.read_adapter(await self._client.request(wire.Call("GET", f"/v1/adapters/{name}")))

    async def delete(self, reference: str) -> int:
        return len((await self._client.request(wire.Call("DELETE", f"/v1/adapters/{reference}")))["deleted"])
