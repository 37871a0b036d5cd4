"""From a validated call to text: resolve the adapter, run the sequence, turn tokens into text, cut at stop strings.

Shared by all generating routes; knows none of their schemas.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field
from functools import partial

from adapter_store.store import Store
from adapter_store.types import AdapterVersion
from server.adapters.lowerer import LoweredProgram, LowererClient
from server.api.selection import Selection
from server.engine.client import EngineClient, EngineOverloaded, EngineUnavailable
from server.engine.types import (
    BASE,
    EngineInfo,
    FinishReason,
    ProgramRef,
    Request,
    RequestError,
    RequestOutput,
    SamplingParams,
    Task,
    TaskResult,
    TokenLogprob,
)
from server.errors import ApiError, from_engine, from_quarantine
from server.last_used import LastUsed
from server.metrics import Metrics
from server.program_ref import program_ref
from server.quarantine import Quarantine
from server.residents import Residents
from server.tokenizer import Detokenizer, StopText, Tokenizer, TokenizerError

LONG_TEXT = 20_000
"""Characters from which tokenising leaves the event loop."""

_NOT_SERVED = {
    Task.GENERATE: "the base model is an encoder, which generates no text; it serves /v1/classify and /v1/embeddings",
    Task.CLASSIFY: "this base model does not serve classifiers",
    Task.EMBED: "the base model's own pooling (modules.json) is not served, so that it has no embeddings here",
}


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a request runs on: a program, and the digests of the adapters in it; the base has none.

    ``num_labels`` is of its classifier, 0 without one; ``per_token``: it answers for every token.
    """

    program: ProgramRef = BASE
    digests: tuple[str, ...] = ()
    num_labels: int = 0
    per_token: bool = False


@dataclass(frozen=True, slots=True)
class Call:
    """One sequence to generate, whoever asked in whatever schema."""

    tenant: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    program: ProgramRef = BASE
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Delta:
    """What one engine output adds: text that is safe to show, the tokens behind it, and at the end the reason."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    stop_logprob: TokenLogprob | None = None


@dataclass(slots=True)
class Completion:
    """A whole result. ``completion_tokens`` counts the tokens made, an end-of-sequence token included."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason = FinishReason.LENGTH
    stop_token_id: int | None = None
    stop_logprob: TokenLogprob | None = None

    @property
    def completion_tokens(self) -> int:
        return len(self.token_ids) + (self.stop_token_id is not None)

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_token_id = delta.stop_token_id
            self.stop_logprob = delta.stop_logprob


class Generation:
    """The one path from routes to the engine."""

    def __init__(
        self,
        engine: EngineClient,
        store: Store,
        lowerer: LowererClient,
        tokenizer: Tokenizer,
        metrics: Metrics,
        residents: Residents,
        quarantine: Quarantine,
        last_used: LastUsed,
        base_names: Sequence[str],
    ) -> None:
        self.tokenizer = tokenizer
        self._engine = engine
        self._store = store
        self._lowerer = lowerer
        self._metrics = metrics
        self._residents = residents
        self._quarantine = quarantine
        self._last_used = last_used
        self._base_names = frozenset(base_names)

    @property
    def info(self) -> EngineInfo:
        """Facts of the running engine. Raises ApiError while there is none."""
        if self._engine.info is None:
            raise ApiError("engine_unavailable", "the engine has not started yet")
        return self._engine.info

    async def resolve(self, tenant: str, held: ExitStack, wanted: Selection, task: Task = Task.GENERATE) -> Resolved:
        """The program of what is asked for, made again if its file is gone. The file stays until ``held`` is closed.

        Raises ApiError, and the ADAPTER_ERRORS.
        """
        if task not in self.info.tasks:
            raise ApiError("task_not_served", _NOT_SERVED[task])
        is_base = wanted.name is None or wanted.name in self._base_names
        if wanted.adapters and not is_base:
            message = (
                f"{wanted.name!r} and `adapters` both say which adapters to use; name the base model or leave `adapters` out"
            )
            raise ApiError("invalid_request", message, param="model")
        named = wanted.adapters or (() if wanted.name is None or is_base else ((wanted.name, 1.0),))
        if not named and wanted.drop:
            raise ApiError("invalid_request", "adapter_drop needs an adapter of which layers are left out", param="adapter_drop")
        if not named:
            return Resolved()
        if wanted.drop > (layers := self.info.base_spec["num_layers"]):
            raise ApiError(
                "not_composable", f"adapter_drop is {wanted.drop}, and the base has {layers} layers", param="adapter_drop"
            )
        program, versions = await self._program(tenant, held, named, wanted)
        if (record := self._quarantine.refusal(tenant, program.program_id)) is not None:
            raise from_quarantine(record, [f"{version.name}@v{version.number}" for version in versions])
        digests = tuple(version.digest for version in versions)
        self._residents.asked(program.program_id, digests, tenant)
        return Resolved(
            program_ref(program), digests, len(program.facts.get("labels", ())), program.facts.get("pooling") == "none"
        )

    async def _program(
        self, tenant: str, held: ExitStack, named: Sequence[tuple[str, float]], wanted: Selection
    ) -> tuple[LoweredProgram, list[AdapterVersion]]:
        # All names first: what is not there is told before any work.
        since = time.monotonic()
        versions = [await asyncio.to_thread(self._store.resolve, tenant, name, wanted.user) for name, _ in named]
        digests = tuple(version.digest for version in versions)
        if len(set(digests)) < len(digests):
            raise ApiError("not_composable", "the same adapter is named twice; add its weights up", param="adapters")
        for version in versions:
            held.enter_context(self._lowerer.using(((version.digest, 1.0),), since=since))
            program = await self._lowerer.ensure(tenant, version.digest, partial(self._store.checkout, version))
        parts = [(digest, weight) for digest, (_, weight) in zip(digests, named, strict=True)]
        if len(parts) > 1 or parts[0][1] != 1.0 or wanted.drop:
            held.enter_context(self._lowerer.using(parts, wanted.drop, since=since))
            program = await self._lowerer.compose(tenant, parts, wanted.drop)
        self._last_used.note(versions)
        return program, versions

    async def encode(self, inputs: Sequence[str | tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Tokens of texts, and tokens as they are; long texts, and many, off the event loop."""
        if sum(len(item) for item in inputs if isinstance(item, str)) < LONG_TEXT:
            return self._encode(inputs)
        return await asyncio.to_thread(self._encode, inputs)

    def _encode(self, inputs: Sequence[str | tuple[int, ...]]) -> list[tuple[int, ...]]:
        return [tuple(self.tokenizer.encode(item)) if isinstance(item, str) else item for item in inputs]

    async def encode_chat(self, messages: list[dict[str, object]]) -> tuple[int, ...]:
        """Tokens of a conversation. Raises ApiError when the template refuses it."""
        try:
            return tuple(await asyncio.to_thread(self.tokenizer.chat, messages))
        except TokenizerError as error:
            raise ApiError("invalid_request", str(error), param="messages") from error

    async def classifiers(self, tenant: str) -> list[str]:
        """Names of the tenant's adapters that have a classifier, as far as one page of them goes."""
        records = await asyncio.to_thread(self._store.records, tenant, 1000, "")
        return [record.name for record in records if record.latest.facts.get("labels")][:20]

    def check_prompt(self, token_ids: Sequence[int], max_tokens: int | None, param: str, program: ProgramRef) -> int:
        """How many tokens may be generated after this prompt: ``max_tokens``, or all that fit. Raises ApiError."""
        room = self.check_tokens(token_ids, 1 if max_tokens is None else max_tokens, param, program)
        return room if max_tokens is None else max_tokens

    def check_tokens(self, token_ids: Sequence[int], wanted: int, param: str, program: ProgramRef) -> int:
        """How many tokens fit behind these, at least the ``wanted`` ones. Raises ApiError."""
        limit = self.info.max_model_len - program.num_virtual
        if not token_ids:
            raise ApiError("empty_prompt", "the prompt has no tokens; send some text", param=param)
        if len(token_ids) + wanted > limit:
            taken = f" (the adapter's {program.num_virtual} virtual tokens take the rest)" if program.num_virtual else ""
            raise ApiError(
                "prompt_too_long",
                f"the prompt has {len(token_ids)} tokens and {wanted} are to be generated, but prompt and output must fit into "
                f"{max(limit, 0)}{taken}; shorten the prompt or ask for fewer",
                param=param,
            )
        if (outside := next((token for token in token_ids if not 0 <= token < self.info.vocab_size), None)) is not None:
            raise ApiError(
                "invalid_token_id", f"token id {outside} is outside the vocabulary of {self.info.vocab_size}", param=param
            )
        return limit - len(token_ids)

    async def stream(self, call: Call, *, whole: bool = False) -> AsyncIterator[Delta]:
        """Run a call. The last delta has the finish reason; ``whole``: nobody needs the tokens before. Raises ApiError, before the first
        delta or in the middle."""
        request = Request(secrets.token_hex(16), call.prompt_token_ids, call.params, call.program, call.tenant, streams=not whole)
        text, stop = Detokenizer(self.tokenizer), StopText(call.stop)
        label = self._metrics.tenant(call.tenant)
        self._metrics.tokens.labels(label, "input").inc(len(call.prompt_token_ids))
        made = self._metrics.tokens.labels(label, "output")
        last = started = time.monotonic()
        is_first = True
        try:
            async with aclosing(self._engine.submit(request)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    now = time.monotonic()
                    self._metrics.waited(now - last, 1 if is_first else len(output.token_ids), is_first=is_first)
                    last, is_first = now, False
                    made.inc(len(output.token_ids))
                    if output.error is not None:
                        raise self._failure(call.tenant, call.program, output.error, started)
                    delta = self._delta(output, text, stop)
                    if delta.finish_reason is not None:
                        self._quarantine.succeeded(call.tenant, call.program.program_id)
                    yield delta
                    if delta.finish_reason is not None:
                        return
        except (EngineOverloaded, EngineUnavailable) as error:
            raise self._refusal(error) from error

    async def answer(self, tenant: str, token_ids: tuple[int, ...], program: ProgramRef, task: Task) -> TaskResult:
        """Run a sequence that makes no token. Raises ApiError."""
        request = Request(secrets.token_hex(16), token_ids, SamplingParams(), program, tenant, task)
        self._metrics.tokens.labels(self._metrics.tenant(tenant), "input").inc(len(token_ids))
        started = time.monotonic()
        try:
            async with aclosing(self._engine.submit(request)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    if output.error is not None:
                        raise self._failure(tenant, program, output.error, started)
                    if output.result is not None:
                        self._quarantine.succeeded(tenant, program.program_id)
                        return output.result
        except (EngineOverloaded, EngineUnavailable) as error:
            raise self._refusal(error) from error
        raise ApiError("internal_error", "the request ended without a result")

    async def complete(self, call: Call) -> Completion:
        """Run a call to its end. Only stop strings have to be looked for in every token as it comes."""
        completion = Completion()
        async with aclosing(self.stream(call, whole=not call.stop)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                completion.add(delta)
        return completion

    def _refusal(self, error: EngineOverloaded | EngineUnavailable) -> ApiError:
        """What the caller is told when no engine takes the request; counted."""
        refusal = from_engine(error)
        self._metrics.rejections.labels(refusal.row.code).inc()
        return refusal

    def _failure(self, tenant: str, program: ProgramRef, error: RequestError, started: float) -> ApiError:
        """What ended a request that was started then; held against its adapters where they are to blame."""
        resident = self._residents.of(program.program_id)
        if not program.is_base and resident is not None:
            self._quarantine.failed(tenant, program.program_id, resident.digests, error.code, started)
        if error.code == "adapter_load_failed":
            # The file may be damaged; the next request makes it anew.
            self._lowerer.discard(program.program_id)
        return from_engine(error)

    def _delta(self, output: RequestOutput, text: Detokenizer, stop: StopText) -> Delta:
        new, stopped = stop.add("".join(text.add(token) for token in output.token_ids))
        reason = FinishReason.STOP if stopped else output.finish_reason
        if reason is not None and not stopped:
            new += stop.flush()
        return Delta(
            text=new,
            token_ids=output.token_ids,
            logprobs=output.logprobs,
            prompt_logprobs=output.prompt_logprobs,
            num_cached_tokens=output.num_cached_tokens,
            finish_reason=reason,
            stop_token_id=output.stop_token_id,
            stop_logprob=output.stop_logprob,
        )
