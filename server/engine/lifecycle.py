"""Requests from their acceptance to their one end, whatever runs them in between: a decoder's engine or an encoder's.

Every request that ``add`` takes ends exactly once, in the outputs of some ``step``. Requests whose program is not at hand wait
for the loader; nobody else does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from server.adapters.bank import Bank
from server.adapters.kernels import Kernel, load_native
from server.engine.loader import Loader
from server.engine.model import DTYPES, BaseModel
from server.engine.pooling import Pooled, classification, embedding, pooled_rows
from server.engine.programs import Programs
from server.engine.sequence import Sequence
from server.engine.settings import EngineSettings
from server.engine.types import EngineInfo, FinishReason, ProgramEvent, Request, RequestError, RequestOutput, Task

NON_FINITE = RequestError("non_finite_output", "the computation overflowed for this request's adapter and prompt")


class Lifecycle(ABC):
    """The bank, the programs and the requests of one engine. ``info`` is set by the engine that this becomes.

    ``wake`` is called from another thread when a load ends.
    """

    info: EngineInfo

    def __init__(self, settings: EngineSettings, base: BaseModel, wake: Callable[[], None]) -> None:
        dtype, device = DTYPES[settings.dtype], torch.device(settings.device)
        self.bank = Bank(base.spec, capacity_bytes=settings.bank_bytes, max_slots=settings.max_slots, dtype=dtype, device=device)
        self.loader = Loader(host_bytes=settings.host_bytes, wake=wake)
        self._counters: Counter[str] = Counter()
        self._programs = Programs(self.bank, self.loader, self._counters)
        self._sequences: dict[str, Sequence] = {}
        self._outputs: list[RequestOutput] = []
        self._order = 0
        self._last_step = (0.0, 0, 0)
        self._embedding = base.embedding
        self._device = device

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
        if self._programs.prepare(sequence):
            self._ready(sequence)

    def abort(self, request_id: str) -> None:
        """End a request early. Unknown ids have ended already."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, RequestOutput(request_id, finish_reason=FinishReason.ABORT))

    def drop_program(self, program_id: str) -> None:
        """Free a program's memory as soon as no sequence uses it."""
        self._programs.drop(program_id)

    def take_events(self) -> list[ProgramEvent]:
        """Program state changes since the last call."""
        return self._programs.take_events()

    def close(self) -> None:
        self.loader.close()

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
    def _is_running(self, sequence: Sequence) -> bool:
        """Whether it holds its program already."""

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
            self._enqueue(sequence)
            return
        # It is not queued yet, so that there is nothing to give back.
        del self._sequences[sequence.request.request_id]
        self._outputs.append(failed(sequence.request.request_id, problem))

    def _pooling(self, sequence: Sequence) -> str:
        """How the hidden states are read: as the program's classifier does, or for a vector, where it reads every row, as the base does."""
        if sequence.generates:
            return ""
        is_vector = sequence.request.task is Task.EMBED
        return self._embedding if is_vector and sequence.head_pooling in ("", "none") else sequence.head_pooling

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
                if problem is not None and not self._is_running(sequence):
                    self._end(sequence, failed(sequence.request.request_id, problem))

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
        self._programs.leave(sequence)
        self._dequeue(sequence)
        self._outputs.append(output)


def failed(request_id: str, error: RequestError | None) -> RequestOutput:
    """The end of a request that could not be run."""
    return RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=error)


def load_kernel(settings: EngineSettings, kernel: Kernel | None) -> Kernel | None:
    """The low-rank kernel: the one asked for, else a compiled one where that is possible."""
    if kernel is None and settings.kernel_dir:
        return load_native(Path(settings.kernel_dir), DTYPES[settings.dtype], torch.device(settings.device))
    return kernel
