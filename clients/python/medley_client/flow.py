"""How work that takes several requests is written once for both clients: as a generator, a *flow*, that asks for requests, pauses and
local work, and is given what came of each. Does no I/O: ``client`` does, with and without ``await``."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Generic, Protocol, TypeVar

from medley_client.errors import ApiError, ConnectionBroke, Fault, MedleyError

RETRIES = 2
MAX_WAIT_S = 120.0
IDEMPOTENCY_KEY = "idempotency-key"
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Body(Protocol):
    """A request's body that is streamed. It may be read several times, for retries."""

    @property
    def headers(self) -> dict[str, str]: ...

    def __iter__(self) -> Iterator[bytes]: ...


class Sink(Protocol):
    """Where a reply's body goes, chunk by chunk. ``begin`` comes before each try."""

    def begin(self) -> None: ...

    def write(self, chunk: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP request. ``path`` is relative to the server's address; a reply that is no error goes to ``sink``, if there is one."""

    method: str
    path: str
    json: Any = None
    params: Mapping[str, str | int] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Body | None = None
    sink: Sink | None = None

    @property
    def is_repeatable(self) -> bool:
        """Whether sending it twice does no more than sending it once."""
        return self.method in ("GET", "HEAD") or IDEMPOTENCY_KEY in self.headers


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """Something that takes the processor or the disk for a while; an event loop gives it to a thread."""

    run: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Reply:
    """What the server answered, an error or not. Names of headers are looked up in any case."""

    status: int
    headers: Mapping[str, str]
    content: bytes = b""

    @property
    def json(self) -> Any:
        return json.loads(self.content)


@dataclass(frozen=True, slots=True)
class Done(Generic[T_co]):
    """What a flow returned."""

    value: T_co


Flow = Generator[Call | Pause | Work, Any, T]
"""``yield Call`` gives a Reply, ``yield Work`` what it returns, ``yield Pause`` nothing; a call may raise CannotConnect."""


class Run(Protocol):
    """Carries out a flow, and returns what it returns."""

    def __call__(self, work: Flow[T], /) -> T: ...


class AsyncRun(Protocol):
    """The same with ``await``."""

    async def __call__(self, work: Flow[T], /) -> T: ...


def advance(flow: Flow[T], outcome: Any) -> Call | Pause | Work | Done[T]:
    """Give a flow what came of its last step (at first None; a MedleyError is raised inside it), and get its next one."""
    try:
        return flow.throw(outcome) if isinstance(outcome, MedleyError) else flow.send(outcome)
    except StopIteration as end:
        return Done(end.value)


def work(run: Callable[[], T]) -> Flow[T]:
    """What ``run`` returns."""
    result: T = yield Work(run)
    return result


def send(call: Call) -> Flow[Reply]:
    """The reply to a call. Transient refusals are tried again, and so is what a broken connection may have swallowed, where that does
    no harm. Raises ApiError, CannotConnect."""
    attempt = 0
    while True:
        try:
            reply: Reply = yield call
        except ConnectionBroke:
            if attempt >= RETRIES or not call.is_repeatable:
                raise
            wait = backoff(attempt)
        else:
            if reply.status < 400:
                return reply
            allowed = retry_wait(attempt, reply.status, reply.headers)
            if allowed is None:
                raise read_error(reply.status, reply.content.decode("utf-8", "replace"), reply.headers)
            wait = allowed
        attempt += 1
        yield Pause(wait)


def request(call: Call) -> Flow[Any]:
    """The JSON of the reply."""
    return (yield from send(call)).json


def head(path: str) -> Flow[Reply | None]:
    """The reply to HEAD, or None if there is no such thing."""
    try:
        return (yield from send(Call("HEAD", path)))
    except ApiError as error:
        if error.status != HTTPStatus.NOT_FOUND:
            raise
        return None


def backoff(attempt: int) -> float:
    """Seconds to wait after try number ``attempt`` (from 0) where nobody says how long."""
    return float(min(8.0, 0.5 * 2**attempt) * random.uniform(0.75, 1.0))  # noqa: S311 - jitter


def retry_wait(attempt: int, status: int, headers: Mapping[str, str]) -> float | None:
    """Seconds to wait before another try; None when there should be none. The server's hints win."""
    hint = headers.get("x-should-retry")
    if attempt >= RETRIES or hint == "false" or (status not in _RETRIED and hint != "true"):
        return None
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            wait = float(headers[name]) * scale
        except (KeyError, ValueError):
            continue
        return wait if 0 <= wait <= MAX_WAIT_S else None
    return backoff(attempt)


def read_error(status: int, text: str, headers: Mapping[str, str]) -> ApiError:
    """An error reply in any of the server's shapes, in that of something between, or without a body, as HEAD gets it."""
    request_id = headers.get("x-request-id")
    try:
        body = json.loads(text)
        error = body["error"]
    except (ValueError, KeyError, TypeError):
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
        said = f": {text[:200]}" if text else ""
        return ApiError(f"the server answered {status} {phrase}{said}", status=status, code="", request_id=request_id)
    if isinstance(error, str):
        return ApiError(error, status=status, code=str(body.get("code", "")), request_id=request_id)
    known = Fault.__slots__
    faults = [Fault(**{name: fault.get(name) for name in known}) for fault in error.get("faults", ())]
    return ApiError(error.get("message", ""), status=status, code=error.get("code") or "", faults=faults, request_id=request_id)
