"""Streamed requests over both kinds of routes, read token by token with the time of each. Knows nothing of what they should say."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from medley_client.flow import read_error

HANG_S = 30.0
"""Longest wait for a token; what takes longer hangs."""


@dataclass(slots=True)
class Choice:
    """What a request said: token ids, or where the route shows none, the tokens' texts; and the logarithms of their probabilities."""

    labels: list[int | str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Reply:
    """How a request went. ``code``: of the error that ended it, ``hang`` after HANG_S without a token, empty when all is well.

    Times are monotonic, in seconds; ``times`` has one for every event with tokens.
    """

    started: float
    choices: list[Choice]
    times: list[float] = field(default_factory=list)
    ended: float = 0.0
    code: str = ""

    @property
    def answered(self) -> float:
        """When the first token came, or the refusal."""
        return self.times[0] if self.times else self.ended

    @property
    def first_token_s(self) -> float:
        return self.answered - self.started

    @property
    def gaps(self) -> list[float]:
        """Seconds between tokens; of requests with one choice."""
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


async def completions(http: httpx.AsyncClient, model: str, prompt: str | Sequence[int], tokens: int, n: int = 1) -> Reply:
    """A greedy request to ``/v1/completions``."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "n": n, "logprobs": 0}
    reply = Reply(time.monotonic(), [Choice() for _ in range(n)])
    async for event in _events(http, "/v1/completions", {**body, "temperature": 0, "ignore_eos": True, "stream": True}, reply):
        for item in event["choices"]:
            choice = reply.choices[item["index"]]
            choice.labels += item["logprobs"]["tokens"]
            choice.logprobs += item["logprobs"]["token_logprobs"]
    return reply


async def generate(http: httpx.AsyncClient, adapter: str, prompt: str, tokens: int) -> Reply:
    """A greedy request to ``/generate_stream``."""
    parameters = {"adapter_id": adapter, "max_new_tokens": tokens, "ignore_eos_token": True}
    reply = Reply(time.monotonic(), [Choice()])
    async for event in _events(http, "/generate_stream", {"inputs": prompt, "parameters": parameters}, reply):
        reply.choices[0].labels.append(event["token"]["id"])
        reply.choices[0].logprobs.append(event["token"]["logprob"])
    return reply


async def _events(http: httpx.AsyncClient, path: str, body: dict[str, Any], reply: Reply) -> AsyncIterator[dict[str, Any]]:
    """The events with tokens; what else happens is written into ``reply``."""
    try:
        async with http.stream("POST", path, json=body, timeout=HANG_S) as response:
            if response.is_error:
                text = (await response.aread()).decode("utf-8", "replace")
                reply.code = read_error(response.status_code, text, response.headers).code
                return
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data:"))
                if "error" in event:
                    reply.code = event.get("code") or event["error"]["code"]
                    return
                reply.times.append(time.monotonic())
                yield event
    except httpx.TimeoutException:
        reply.code = "hang"
    except httpx.TransportError as error:
        reply.code = type(error).__name__
    finally:
        reply.ended = time.monotonic()
