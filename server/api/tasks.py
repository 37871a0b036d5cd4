"""``/v1/classify`` and ``/v1/embeddings``: texts in, labels or vectors out. ``model`` is an adapter name."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from server.api.generation import Generation, Resolved
from server.api.task_schemas import ClassifyRequest, EmbeddingsRequest, TaskRequest
from server.engine.types import Task, TaskResult
from server.errors import ApiError

router = APIRouter(prefix="/v1")
MAX_IN_FLIGHT = 64
"""Inputs of one call that are in the engine's queue at a time: a large call must not fill it."""
MAX_SCORES = 1 << 18

Answered = list[tuple[tuple[int, ...], TaskResult]]
"""An input's tokens, and what came of them."""


@router.post("/classify", response_model=None)
async def classify(request: Request, body: ClassifyRequest) -> JSONResponse:
    """What the adapter's classifier says of each input, or of each of its tokens."""
    generation: Generation = request.app.state.services.generation
    try:
        answered = await _answer_all(request, generation, body, Task.CLASSIFY)
    except ApiError as error:
        raise await _with_hint(generation, request.state.tenant, error) from error
    data = await asyncio.to_thread(_all_classified, generation, answered, body.logits)
    return JSONResponse({"object": "list", "model": body.model, "data": data, "usage": _usage(answered)})


@router.post("/embeddings", response_model=None)
async def embeddings(request: Request, body: EmbeddingsRequest) -> JSONResponse:
    """A vector of unit length for each input."""
    generation: Generation = request.app.state.services.generation
    width = generation.info.base_spec["hidden_size"]
    if body.dimensions not in (None, width):
        raise ApiError(
            "unsupported_parameter",
            f"vectors have {width} dimensions here, and are not cut; leave `dimensions` out",
            param="dimensions",
        )
    answered = await _answer_all(request, generation, body, Task.EMBED)
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(result.rows[0], body.encoding_format)}
        for index, (_, result) in enumerate(answered)
    ]
    return JSONResponse({"object": "list", "model": body.model, "data": data, "usage": _usage(answered)})


async def _answer_all(request: Request, generation: Generation, body: TaskRequest, task: Task) -> Answered:
    """Run all inputs. The first error ends them all."""
    resolved = await generation.resolve(request.state.tenant, request.state.held, body.selection, task)
    request.state.adapter = "+".join(resolved.digests)
    inputs = await generation.encode(body.input)
    for index, tokens in enumerate(inputs):
        generation.check_tokens(tokens, 0, "input" if len(inputs) == 1 else f"input.{index}", resolved.program)
    if task is Task.CLASSIFY:
        _check_reply(inputs, resolved)
    places = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def one(tokens: tuple[int, ...]) -> TaskResult:
        async with places:
            return await generation.answer(request.state.tenant, tokens, resolved.program, task)

    error: ApiError | None = None
    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(tokens)) for tokens in inputs]
    except* ApiError as failed:
        error = next(item for item in failed.exceptions if isinstance(item, ApiError))
    if error is not None:
        raise error
    return [(tokens, task.result()) for tokens, task in zip(inputs, running, strict=True)]


def _check_reply(inputs: Sequence[tuple[int, ...]], resolved: Resolved) -> None:
    """Every score is named in the reply: refuse what would be too much of it, before any work."""
    rows = sum(len(tokens) for tokens in inputs) if resolved.per_token else len(inputs)
    if rows * resolved.num_labels > MAX_SCORES:
        what = "tokens" if resolved.per_token else "inputs"
        message = f"{rows} {what} with {resolved.num_labels} labels each are more than the {MAX_SCORES} scores that a reply holds; send fewer"
        raise ApiError("invalid_request", message, param="input")


async def _with_hint(generation: Generation, tenant: str, error: ApiError) -> ApiError:
    """An adapter without a classifier: say which ones of the tenant's have one."""
    if error.row.code != "no_task_head":
        return error
    names = await generation.classifiers(tenant)
    hint = (
        f"those of your adapters that have one: {', '.join(names)}" if names else "none of your adapters has one; push one first"
    )
    return ApiError("no_task_head", f"{error.message}; {hint}", param="model")


def _all_classified(generation: Generation, answered: Answered, with_logits: bool) -> list[dict[str, Any]]:
    return [
        {"index": index, **_classified(generation, tokens, result, with_logits)}
        for index, (tokens, result) in enumerate(answered)
    ]


def _classified(generation: Generation, tokens: Sequence[int], result: TaskResult, with_logits: bool) -> dict[str, Any]:
    if not result.per_token:
        return _scored(result, result.rows[0], with_logits)
    tokenizer = generation.tokenizer
    return {
        "tokens": [
            {
                "id": token,
                "token": tokenizer.token_text(token),
                "special": tokenizer.is_special(token),
                **_scored(result, row, with_logits),
            }
            for token, row in zip(tokens, result.rows, strict=True)
        ]
    }


def _scored(result: TaskResult, logits: Sequence[float], with_logits: bool) -> dict[str, Any]:
    """Probabilities, the best first: of labels that exclude each other (softmax), or of each by itself (sigmoid)."""
    probabilities = [_sigmoid(logit) for logit in logits] if result.multi_label else _softmax(logits)
    ranked = sorted(zip(result.labels, probabilities, logits, strict=True), key=lambda item: -item[2])
    shown: dict[str, Any] = {
        "label": ranked[0][0],
        "scores": {label: probability for label, probability, _ in ranked},
    }
    if result.multi_label:
        shown["labels"] = [label for label, probability, _ in ranked if probability >= 0.5]
    if with_logits:
        shown["logits"] = {label: logit for label, _, logit in ranked}
    return shown


def _softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    total = sum(weights)
    return [weight / total for weight in weights]


def _sigmoid(logit: float) -> float:
    # Either form overflows on one side.
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))


def _encoded(vector: Sequence[float], form: str) -> list[float] | str:
    """OpenAI's ``base64`` is little-endian fp32."""
    return list(vector) if form == "float" else base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _usage(answered: Answered) -> dict[str, int]:
    count = sum(len(tokens) for tokens, _ in answered)
    return {"prompt_tokens": count, "total_tokens": count}
