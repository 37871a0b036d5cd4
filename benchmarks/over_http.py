"""Medley under load over real HTTP: all requests at once, tokens per second of the whole batch."""

from __future__ import annotations

import asyncio
import time

import httpx

from benchmarks.work import NEW_TOKENS


async def _one(client: httpx.AsyncClient, prompt: list[int], model: str, new_tokens: int) -> int:
    body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    reply = await client.post("/v1/completions", json=body)
    reply.raise_for_status()
    return int(reply.json()["usage"]["completion_tokens"])


async def _all(url: str, prompts: list[list[int]], models: list[str], new_tokens: int) -> float:
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        started = time.perf_counter()
        made = await asyncio.gather(
            *(_one(client, prompt, model, new_tokens) for prompt, model in zip(prompts, models, strict=True))
        )
        return sum(made) / (time.perf_counter() - started)


def tokens_per_second(url: str, prompts: list[list[int]], names: list[str], new_tokens: int = NEW_TOKENS) -> float:
    """Request ``i`` goes to ``names[i % len(names)]``; no names: all to the base."""
    models = [names[index % len(names)] if names else "base" for index in range(len(prompts))]
    return asyncio.run(_all(url, prompts, models, new_tokens))
