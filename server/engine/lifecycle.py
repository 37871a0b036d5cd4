"""Requests from their acceptance to their one end, whatever runs them in between: a decoder's engine or an encoder's.

Every request that ``add`` takes ends exactly once, in the outputs of some ``step``. Requests whose program is not at hand wait
for the loader; nobody else does.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from server.adapters.bank import COMPUTE_ERRORS, Bank
from server.adapters.copy_stream import CudaCopyStream
from server.adapters.kernels import Kernel, NativeEdits
from server.engine.host_tier import HostTier
from server.engine.kernels.choice import choose_kernels
from server.engine.kernels.swap import swap_native
from server.engine.loader import Loader
from server.engine.model import DTYPES, BaseModel, load_base
from server.engine.pooling import Pooled, classification, embedding, pooled_rows
from server.engine.programs import Programs
from server.engine.sequence import Sequence, SequenceState
from server.engine.settings import EngineSettings
from server.engine.types import (
    EngineInfo,
    EngineStats,
    FinishReason,
    ProgramEvent,
    ProgramRef,
    Request,
    RequestError,
    RequestOutput,
    Task,
)

NON_FINITE = RequestError("non_finite_output", "the computation overflowed for this request's adapter and prompt")

log = logging.getLogger(__name__)


class Work(Protocol):
    """A sequence's part in a step."""

    @property
    def sequence(self) -> Sequence: ...


W = TypeVar("W", bound=Work)
R = TypeVar("R")


class Lifecycle(ABC, Generic[W, R]):
    """Owns the device: the base model and the bank, the programs and the requests of one engine. A step runs work W, which gives an R.

    ``wake`` is called from another thread when a load ends. ``kernel`` forces those of edits, for tests that compare the fast ones
    with the reference; ``clock`` (seconds) is what programs count as recently used by.
    """

    def __init__(
        self,
        settings: EngineSettings,
        *,
        wake: Callable[[], None] = lambda: None,
        kernel: Kernel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        dtype, device = DTYPES[settings.dtype], torch.device(settings.device)
        base = load_base(Path(settings.model_dir), settings.base_digest, settings.dtype, settings.device)
        self.info = _describe(settings, base)
        self._kernels = choose_kernels(settings.kernel_dir, dtype, device, edits=kernel)
        self.bank = Bank(
            base.spec,
            capacity_bytes=settings.bank_bytes,
            max_slots=settings.max_slots,
            dtype=dtype,
            device=device,
            keeps_bf16=isinstance(self._kernels.edits, NativeEdits),
            copy_stream=CudaCopyStream(device) if device.type == "cuda" else None,
            clock=clock,
        )
        self.host = HostTier(settings.host_bytes, clock=clock)
        self.loader = Loader(base.spec, pin_memory=device.type == "cuda", wake=wake)
        self._counters: Counter[str] = Counter()
        self._programs = Programs(self.bank, self.host, self.loader, self._counters, pins_fit=settings.pins_fit, clock=clock)
        self._sequences: dict[str, Sequence] = {}
        self._outputs: list[RequestOutput] = []
        self._order = 0
        self._last_step = (0.0, 0, 0)
        self._is_stuck = False
        self._device = device
        self._base = base
        if self._kernels.native is not None:
            swap_native(base.model, self._kernels.native)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has yet to end."""
        return bool(self._sequences or self._outputs)

    def add(self, request: Request) -> None:
        """Take a request. Its first output comes from a later ``step``, also when it is refused."""
        problem = self._problem(request)
        if problem is not None:
            self._outputs.append(failed(request.request_id, problem))
            return
        self._order += 1
        sequence = Sequence(request, self._order)
        self._sequences[request.request_id] = sequence
        if self._programs.enter(sequence):
            self._ready(sequence)

    def abort(self, request_id: str) -> None:
        """End a request early. Unknown ids have ended already."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, RequestOutput(request_id, finish_reason=FinishReason.ABORT))

    def step(self) -> list[RequestOutput]:
        """Choose, run, answer. Returns what became of requests since the last step."""
        self._receive_loads()
        started = time.monotonic()
        work = self._choose()
        self._programs.prefetch()
        if work:
            adapters = len({item.sequence.slot for item in work if item.sequence.slot})
            self._run(work)
            self._last_step = (time.monotonic() - started, len(work), adapters)
            self._counters["steps"] += 1
        self._is_stuck = not work
        outputs, self._outputs = self._outputs, []
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot between two steps."""
        return EngineStats(
            waiting_for_adapter=self._programs.num_waiting,
            bank_bytes_total=self.bank.capacity_bytes,
            bank_bytes_used=self.bank.used_bytes,
            bank_bytes_pinned=self.bank.permanent_bytes,
            host_bytes_total=self.host.capacity_bytes,
            host_bytes_used=self.host.used_bytes,
            slots_total=self.bank.max_slots,
            slots_used=self.bank.num_slots_used,
            slots_pinned=self.bank.num_slots_pinned,
            counters=dict(self._counters),
            last_step_seconds=self._last_step[0],
            last_step_rows=self._last_step[1],
            last_step_adapters=self._last_step[2],
        )

    def drop_program(self, program_id: str) -> None:
        """Free a program's memory, on the device and in the host, as soon as no request uses it."""
        self._programs.drop(program_id)

    def pin_program(self, program: ProgramRef) -> None:
        """Bring a program to the device and keep it there; an event with the reason ``pin_limit`` or ``load_failed`` says that it is not."""
        self._programs.pin_program(program)

    def unpin_program(self, program_id: str) -> None:
        """The program is one among others again."""
        self._programs.unpin_program(program_id)

    def load_program(self, program: ProgramRef) -> None:
        """Bring a program to the host, and to the device if that takes nothing from anybody's share."""
        self._programs.load_program(program)

    def take_events(self) -> list[ProgramEvent]:
        """Program state changes since the last call."""
        return self._programs.take_events()

    def close(self) -> None:
        self.loader.close()
        self.bank.close()

    @abstractmethod
    def _enqueue(self, sequence: Sequence) -> None:
        """Queue a sequence whose program is at hand."""

    @abstractmethod
    def _dequeue(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and give back what it holds."""

    @abstractmethod
    def _taken(self, sequence: Sequence) -> int:
        """How much of the model's length the sequence's program takes for itself."""

    @abstractmethod
    def _choose(self) -> list[W]:
        """The next step's work. Its sequences are running and hold their programs."""

    @abstractmethod
    def _compute(self, work: list[W]) -> R:
        """Run work, or a part of a step's, on the device."""

    @abstractmethod
    def _finish(self, result: R) -> None:
        """Answer what has been computed."""

    def _problem(self, request: Request) -> RequestError | None:
        """What the engine cannot run, checked here once more whatever the edge has checked."""
        length, limit = len(request.prompt_token_ids), self.info.max_model_len
        if request.request_id in self._sequences:
            return RequestError("duplicate_request", f"request {request.request_id} is already running")
        if request.task not in self.info.tasks:
            return RequestError("task_not_served", f"this base model does not serve {request.task.value} requests")
        if not length:
            return RequestError("empty_prompt", "the prompt has no tokens")
        if request.task is Task.GENERATE and length >= limit:
            return RequestError(
                "prompt_too_long", f"the prompt has {length} tokens; with one to generate, at most {limit - 1} fit"
            )
        if length > limit:
            return RequestError("prompt_too_long", f"the input has {length} tokens; at most {limit} fit")
        outside = [token for token in request.prompt_token_ids if not 0 <= token < self.info.vocab_size]
        if outside:
            return RequestError("invalid_token_id", f"token id {outside[0]} is outside the vocabulary of {self.info.vocab_size}")
        return None

    def _ready(self, sequence: Sequence) -> None:
        """Queue a sequence whose program is at hand, unless the program cannot do what is asked or leaves too little room for it."""
        sequence.pooling = self._pooling(sequence)
        problem = self._misfit(sequence)
        if problem is None:
            self._is_stuck = False
            self._enqueue(sequence)
            return
        # It is not queued yet, so that there is nothing else to give back.
        del self._sequences[sequence.request.request_id]
        self._programs.leave(sequence)
        self._outputs.append(failed(sequence.request.request_id, problem))

    def _pooling(self, sequence: Sequence) -> str:
        """How the hidden states are read: as the program's classifier does, or for a vector, where it reads every row, as the base does."""
        if sequence.generates:
            return ""
        is_vector = sequence.request.task is Task.EMBED
        return self._base.embedding if is_vector and sequence.head_pooling in ("", "none") else sequence.head_pooling

    def _misfit(self, sequence: Sequence) -> RequestError | None:
        if sequence.request.task is Task.CLASSIFY and not sequence.head_pooling:
            return RequestError("no_task_head", "neither the base model nor this adapter has a classifier")
        length, taken, made = len(sequence.token_ids), self._taken(sequence), int(sequence.generates)
        room = max(self.info.max_model_len - taken - made, 0)
        if length <= room:
            return None
        others = f"the adapter's {taken} virtual tokens" + (" and one to generate" if made else "")
        return RequestError("prompt_too_long", f"the prompt has {length} tokens; with {others}, {room} fit")

    def _receive_loads(self) -> None:
        """Queue the sequences whose programs have come, and fail those whose programs cannot be had."""
        arrivals = self._programs.arrivals()
        for sequence in arrivals.ready:
            self._ready(sequence)
        if arrivals.failed:
            for sequence in list(self._sequences.values()):
                problem = arrivals.failed.get(sequence.program.program_id)
                if problem is not None and sequence.state is not SequenceState.RUNNING:
                    self._end(sequence, failed(sequence.request.request_id, problem))

    def _run(self, work: list[W]) -> None:
        """Together; where that raises, one by one, so that only those that raise alone fail."""
        try:
            result = self._compute(work)
        except COMPUTE_ERRORS:
            log.exception("a step of %d sequences failed", len(work))
        else:
            self._finish(result)
            return
        for item in work:
            try:
                result = self._compute([item])
            except COMPUTE_ERRORS:
                log.exception("request %s failed alone", item.sequence.request.request_id)
                self._fail_row(item.sequence, RequestError("internal_error", "the engine failed on this request"))
            else:
                self._finish(result)

    def _answer(self, sequence: Sequence, pooled: Pooled) -> None:
        """End a request that makes no token: all its rows have been pooled."""
        rows = pooled_rows(sequence.pooling, pooled)
        resident = self.bank.resident(sequence.slot) if sequence.slot else None
        if sequence.request.task is Task.CLASSIFY and resident is not None and resident.head is not None:
            result = classification(rows, resident.head, resident.extras)
        else:
            result = embedding(rows)
        if result is None:
            self._fail_row(sequence, NON_FINITE)
        else:
            self._end(sequence, RequestOutput(sequence.request.request_id, finish_reason=FinishReason.STOP, result=result))

    def _fail_row(self, sequence: Sequence, error: RequestError) -> None:
        self._counters["failed_rows"] += 1
        self._end(sequence, failed(sequence.request.request_id, error))

    def _end(self, sequence: Sequence, output: RequestOutput) -> None:
        del self._sequences[sequence.request.request_id]
        self._dequeue(sequence)
        self._programs.leave(sequence)
        self._outputs.append(output)


def failed(request_id: str, error: RequestError | None) -> RequestOutput:
    """The end of a request that could not be run."""
    return RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=error)


def _describe(settings: EngineSettings, base: BaseModel) -> EngineInfo:
    """What is told of an engine without K/V."""
    generates = not base.spec.is_encoder
    return EngineInfo(
        model_name=settings.model_name,
        base_digest=settings.base_digest,
        dtype=settings.dtype,
        max_model_len=min(settings.max_model_len or base.max_positions, base.max_positions),
        vocab_size=base.spec.vocab_size,
        eos_token_ids=base.eos_token_ids if generates else (),
        block_size=0,
        num_blocks=0,
        base_spec=base.spec.to_json(),
        tasks=(*((Task.GENERATE,) if generates else ()), Task.CLASSIFY, *((Task.EMBED,) if base.embedding else ())),
    )
