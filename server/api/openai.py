"""``/v1/completions``, ``/v1/chat/completions`` and ``/v1/models``, as the OpenAI SDK speaks them. ``model`` is an adapter name."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api import choices, sse
from server.api.choices import Choice
from server.api.generation import Call, Completion, Delta, Generation
from server.api.schemas import ChatRequest, CompletionRequest
from server.errors import ApiError

router = APIRouter(prefix="/v1")


@router.post("/completions", response_model=None)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Text after one or several prompts."""
    generation: Generation = request.app.state.services.generation
    resolved = await generation.resolve(request.state.tenant, request.state.held, body.selection)
    request.state.adapter = "+".join(resolved.digests)
    found: list[Choice] = []
    for tokens in await generation.encode(body.prompt):
        limit = generation.check_prompt(tokens, body.max_tokens, "prompt", resolved.program)
        for number in range(body.n or 1):
            call = Call(request.state.tenant, tokens, body.sampling(limit, number), resolved.program, body.stops)
            found.append(
                Choice(
                    call,
                    echo=generation.tokenizer.decode(tokens) if body.echo else "",
                    num_echoed=len(tokens) if body.echo else 0,
                )
            )
    render = choices.TextRenderer(generation.tokenizer, body.logprobs is not None)
    return await _answer(generation, body, found, render, "text_completion", "cmpl")


@router.post("/chat/completions", response_model=None)
async def chat(request: Request, body: ChatRequest) -> Response:
    """The assistant's next message, in the base model's chat template."""
    generation: Generation = request.app.state.services.generation
    if body.top_logprobs and not body.logprobs:
        raise ApiError("invalid_request", "top_logprobs needs logprobs: true", param="top_logprobs")
    resolved = await generation.resolve(request.state.tenant, request.state.held, body.selection)
    request.state.adapter = "+".join(resolved.digests)
    tokens = await generation.encode_chat([message.plain() for message in body.messages])
    limit = generation.check_prompt(tokens, body.limit, "messages", resolved.program)
    found = [
        Choice(Call(request.state.tenant, tokens, body.sampling(limit, number), resolved.program, body.stops))
        for number in range(body.n or 1)
    ]
    render = choices.ChatRenderer(generation.tokenizer, bool(body.logprobs))
    return await _answer(generation, body, found, render, "chat.completion", "chatcmpl")


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The base, and the tenant's adapters and aliases."""
    services = request.app.state.services
    listed = [_model(name, services.started, "medley") for name in services.base_names[:1]]
    tenant, parent = request.state.tenant, services.base_names[0]
    after = ""
    while names := await asyncio.to_thread(services.store.listed, tenant, 1000, after):
        listed += [_model(item.name, item.created or services.started, tenant, parent) for item in names]
        after = names[-1].name
    return {"object": "list", "data": listed}


@router.get("/models/{name}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One model by name."""
    services = request.app.state.services
    if name in services.base_names:
        return _model(name, services.started, "medley")
    version = await asyncio.to_thread(services.store.resolve, request.state.tenant, name)
    return _model(name, version.created, request.state.tenant, services.base_names[0])


def _model(name: str, created: float, owner: str, parent: str | None = None) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": owner, "parent": parent}


async def _answer(
    generation: Generation,
    body: CompletionRequest | ChatRequest,
    found: list[Choice],
    render: choices.TextRenderer | choices.ChatRenderer,
    kind: str,
    prefix: str,
) -> Response:
    head = {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": generation.info.base_digest[:16],
    }
    if body.stream:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        chunk_kind = "chat.completion.chunk" if kind == "chat.completion" else kind
        events = _chunks(generation, found, render, {**head, "object": chunk_kind}, include_usage)
        return await sse.respond(events, ApiError.openai_body, done=True)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_completion(generation, choice.call)) for choice in found]
    results = [task.result() for task in tasks]
    if (failed := next((item for item in results if isinstance(item, ApiError)), None)) is not None:
        raise failed
    done = [item for item in results if isinstance(item, Completion)]
    shown = [render.whole(index, choice, completion) for index, (choice, completion) in enumerate(zip(found, done, strict=True))]
    return JSONResponse({**head, "object": kind, "choices": shown, "usage": choices.usage(found, done)})


async def _completion(generation: Generation, call: Call) -> Completion | ApiError:
    """Errors as values: a task group would wrap them, and one failed choice must not leave others running unseen."""
    try:
        return await generation.complete(call)
    except ApiError as error:
        return error


async def _chunks(
    generation: Generation,
    found: list[Choice],
    render: choices.TextRenderer | choices.ChatRenderer,
    head: dict[str, Any],
    include_usage: bool,
) -> AsyncIterator[dict[str, Any]]:
    """Chunks of all choices as they come, then usage where it was asked for."""
    done = [Completion() for _ in found]
    without_usage: dict[str, Any] = {"usage": None} if include_usage else {}
    async with aclosing(_merged(generation, found)) as deltas:  # type: ignore[type-var]
        async for index, delta in deltas:
            is_first = not done[index].token_ids and done[index].stop_token_id is None
            for choice in render.parts(index, found[index], delta, done[index], is_first):
                yield {**head, "choices": [choice], **without_usage}
            done[index].add(delta)
    if include_usage:
        yield {**head, "choices": [], "usage": choices.usage(found, done)}


async def _merged(generation: Generation, found: list[Choice]) -> AsyncIterator[tuple[int, Delta]]:
    """The deltas of several streams, as they come. The first error ends them all."""
    if len(found) == 1:
        # Most replies have one choice, which needs no task and no queue of its own.
        async with aclosing(generation.stream(found[0].call)) as only:  # type: ignore[type-var]
            async for delta in only:
                yield 0, delta
        return
    queue: asyncio.Queue[tuple[int, Delta | ApiError]] = asyncio.Queue()

    async def pump(index: int, call: Call) -> None:
        try:
            async with aclosing(generation.stream(call)) as deltas:  # type: ignore[type-var]
                async for delta in deltas:
                    queue.put_nowait((index, delta))
        except ApiError as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index, choice.call)) for index, choice in enumerate(found)]
    try:
        left = len(tasks)
        while left:
            index, item = await queue.get()
            if isinstance(item, ApiError):
                raise item
            left -= item.finish_reason is not None
            yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
