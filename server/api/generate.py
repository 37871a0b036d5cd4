"""``/generate`` and ``/generate_stream``: the schema that LoRAX and text-generation-inference clients speak."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.api import sse
from server.api.generation import Call, Completion, Generation
from server.api.schemas import GenerateParameters, GenerateRequest
from server.engine.types import FinishReason, TokenLogprob
from server.errors import ApiError

router = APIRouter()


@router.post("/", response_model=None)
async def either(request: Request, body: GenerateRequest) -> Response:
    """What the clients of both servers post to: a stream, or a list with one reply, as ``stream`` says."""
    if body.stream:
        return await generate_stream(request, body)
    reply, headers = await _whole(request, body)
    return JSONResponse([reply], headers=headers)


@router.post("/generate", response_model=None)
async def generate(request: Request, body: GenerateRequest) -> Response:
    """The whole text at once."""
    reply, headers = await _whole(request, body)
    return JSONResponse(reply, headers=headers)


async def _whole(request: Request, body: GenerateRequest) -> tuple[dict[str, Any], dict[str, str]]:
    """The reply and its headers."""
    generation: Generation = request.app.state.services.generation
    call = await _call(request, generation, body)
    completion = await generation.complete(call)
    reply: dict[str, Any] = {"generated_text": _full(body, completion.text)}
    if body.parameters.details:
        reply["details"] = _details(generation, body.parameters, call, completion)
    return reply, {"x-prompt-tokens": str(len(call.prompt_token_ids)), "x-generated-tokens": str(completion.completion_tokens)}


@router.post("/generate_stream", response_model=None)
async def generate_stream(request: Request, body: GenerateRequest) -> Response:
    """A token an event; the last one has the whole text and the details."""
    generation: Generation = request.app.state.services.generation
    if body.parameters.decoder_input_details:
        raise ApiError(
            "validation", "decoder_input_details needs /generate: a stream has no prompt tokens", param="decoder_input_details"
        )
    call = await _call(request, generation, body)
    return await sse.respond(_events(generation, body, call), ApiError.tgi_body, done=False)


@router.get("/info")
async def info(request: Request) -> dict[str, Any]:
    """What text-generation-inference tells about itself, as far as it applies."""
    generation: Generation = request.app.state.services.generation
    facts = generation.info
    return {
        "model_id": facts.model_name,
        "model_sha": facts.base_digest,
        "model_dtype": facts.dtype,
        "model_device_type": "cpu",
        "max_total_tokens": facts.max_model_len,
        "max_input_length": facts.max_model_len - 1,
        "max_stop_sequences": 4,
        "max_best_of": 1,
        "version": request.app.version,
        "router": "medley",
    }


async def _call(request: Request, generation: Generation, body: GenerateRequest) -> Call:
    parameters = body.parameters
    if parameters.adapter_source not in (None, "medley", "local"):
        raise ApiError(
            "validation",
            f"adapter_source {parameters.adapter_source!r} is not served: adapters are pushed to this server (`medley push`), never fetched for you",
            param="adapter_source",
        )
    resolved = await generation.resolve(request.state.tenant, request.state.held, parameters.selection)
    request.state.adapter = "+".join(resolved.digests)
    if parameters.apply_chat_template:
        tokens = await generation.encode_chat([{"role": "user", "content": body.inputs}])
    else:
        (tokens,) = await generation.encode([body.inputs])
    if parameters.truncate is not None:
        tokens = tokens[-parameters.truncate :]
    max_tokens = generation.check_prompt(tokens, parameters.max_new_tokens, "inputs", resolved.program)
    return Call(request.state.tenant, tokens, parameters.sampling(max_tokens), resolved.program, tuple(parameters.stop))


async def _events(generation: Generation, body: GenerateRequest, call: Call) -> AsyncIterator[dict[str, Any]]:
    completion = Completion()
    async with aclosing(generation.stream(call)) as deltas:  # type: ignore[type-var]
        async for delta in deltas:
            completion.add(delta)
            ended = delta.finish_reason is not None
            texts = [delta.text] + [""] * (len(delta.token_ids) - 1)
            tokens = [_token(generation, item, text) for item, text in zip(delta.logprobs, texts, strict=False)]
            if delta.stop_logprob is not None:
                # What was held back for stop strings comes with the token that ends the text.
                shown = delta.text + generation.tokenizer.token_text(delta.stop_logprob.token_id)
                tokens.append(_token(generation, delta.stop_logprob, shown))
            for index, token in enumerate(tokens):
                last = ended and index == len(tokens) - 1
                yield {
                    "token": token,
                    "generated_text": _full(body, completion.text) if last else None,
                    "details": _summary(body.parameters, call, completion) if last else None,
                }


def _details(generation: Generation, parameters: GenerateParameters, call: Call, completion: Completion) -> dict[str, Any]:
    details = _summary(parameters, call, completion)
    prefill = completion.prompt_logprobs or ()
    details["prefill"] = [
        {"id": token, "text": generation.tokenizer.token_text(token), "logprob": item.logprob if item else None}
        for token, item in zip(call.prompt_token_ids, prefill, strict=False)
    ]
    made = completion.logprobs if completion.stop_logprob is None else [*completion.logprobs, completion.stop_logprob]
    details["tokens"] = [_token(generation, item, generation.tokenizer.token_text(item.token_id)) for item in made]
    return details


def _summary(parameters: GenerateParameters, call: Call, completion: Completion) -> dict[str, Any]:
    if completion.finish_reason is FinishReason.LENGTH:
        reason = "length"
    else:
        reason = "eos_token" if completion.stop_token_id is not None else "stop_sequence"
    return {
        "finish_reason": reason,
        "prompt_tokens": len(call.prompt_token_ids),
        "generated_tokens": completion.completion_tokens,
        "skipped_tokens": 0,
        "seed": parameters.seed,
    }


def _token(generation: Generation, item: TokenLogprob, text: str) -> dict[str, Any]:
    token: dict[str, Any] = {
        "id": item.token_id,
        "text": text,
        "logprob": item.logprob,
        "special": generation.tokenizer.is_special(item.token_id),
    }
    if item.top:
        token["alternative_tokens"] = [
            {"id": other, "text": generation.tokenizer.token_text(other), "logprob": logprob} for other, logprob in item.top
        ]
    return token


def _full(body: GenerateRequest, text: str) -> str:
    return body.inputs + text if body.parameters.return_full_text else text
