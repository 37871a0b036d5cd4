"""The engine: add, abort, step. Synchronous, in one thread, and the only place where its parts meet.

Every request that ``add`` takes ends exactly once, in the outputs of some ``step``. Requests whose program is not at hand wait
for the loader; nobody else does.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from server.adapters.bank import Bank
from server.adapters.kernels import Kernel, load_native
from server.engine.batch import Batch, pack
from server.engine.block_manager import BlockManager
from server.engine.kv_cache import KVCache
from server.engine.loader import Loader
from server.engine.model import DTYPES, BaseModel, load_base
from server.engine.programs import Programs
from server.engine.runner import Runner, StepResult
from server.engine.sampler import log_probabilities, sample
from server.engine.scheduler import Schedule, Scheduled, Scheduler
from server.engine.sequence import Sequence
from server.engine.settings import EngineSettings
from server.engine.types import (
    EngineInfo,
    EngineStats,
    FinishReason,
    ProgramEvent,
    Request,
    RequestError,
    RequestOutput,
    TokenLogprob,
)

log = logging.getLogger(__name__)


class Engine:
    """Owns the device: base model, K/V blocks and bank. ``wake`` is called from another thread when a load ends.

    ``kernel`` forces one low-rank kernel, for tests that compare the fast ones with the reference.
    """

    def __init__(
        self, settings: EngineSettings, *, wake: Callable[[], None] = lambda: None, kernel: Kernel | None = None
    ) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        base = load_base(Path(settings.model_dir), settings.base_digest, settings.dtype, settings.device)
        device = torch.device(settings.device)
        dtype = DTYPES[settings.dtype]
        num_blocks = _num_blocks(settings, base)
        capacity = (num_blocks - 1) * settings.block_size
        self.blocks = BlockManager(num_blocks, settings.block_size, prefix_caching=settings.prefix_caching)
        self.bank = Bank(base.spec, capacity_bytes=settings.bank_bytes, max_slots=settings.max_slots, dtype=dtype, device=device)
        cache = KVCache(
            num_layers=base.num_layers,
            num_blocks=num_blocks,
            block_size=settings.block_size,
            kv_heads=base.kv_heads,
            head_dim=base.head_dim,
            dtype=dtype,
            device=device,
        )
        self._counters: Counter[str] = Counter()
        self.loader = Loader(host_bytes=settings.host_bytes, wake=wake)
        self._programs = Programs(self.bank, self.loader, self._counters)
        self.scheduler = Scheduler(
            self.blocks,
            max_running=settings.max_running,
            max_batch_tokens=settings.max_batch_tokens,
            pin=self._programs.pin,
            unpin=self._programs.unpin,
        )
        self.info = EngineInfo(
            model_name=settings.model_name,
            base_digest=settings.base_digest,
            dtype=settings.dtype,
            max_model_len=min(settings.max_model_len or base.max_positions, base.max_positions, capacity),
            vocab_size=base.spec.vocab_size,
            eos_token_ids=base.eos_token_ids,
            block_size=settings.block_size,
            num_blocks=num_blocks,
            base_spec=base.spec.to_json(),
        )
        self._device = device
        if kernel is None and settings.kernel_dir:
            kernel = load_native(Path(settings.kernel_dir), dtype, device)
        self._runner = Runner(base, cache, self.bank, kernel=kernel)
        self._sequences: dict[str, Sequence] = {}
        self._outputs: list[RequestOutput] = []
        self._order = 0
        self._last_step = (0.0, 0, 0)

    @property
    def has_runnable(self) -> bool:
        """Whether ``step`` has something to do now. Sequences that only wait for a program do not count: ``wake`` tells of those."""
        return bool(self._outputs or self.scheduler.running) or (self.scheduler.has_work and not self.loader.is_loading)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request has yet to end."""
        return bool(self._sequences or self._outputs)

    def add(self, request: Request) -> None:
        """Take a request. Its first output comes from a later ``step``, also when it is refused."""
        problem = self._problem(request)
        if problem is not None:
            self._outputs.append(_failed(request.request_id, problem))
            return
        self._order += 1
        sequence = Sequence(request, self._order)
        self._sequences[request.request_id] = sequence
        if self._programs.prepare(sequence):
            self._queue(sequence)

    def abort(self, request_id: str) -> None:
        """End a request early. Unknown ids have ended already."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._end(sequence, RequestOutput(request_id, finish_reason=FinishReason.ABORT))

    def drop_program(self, program_id: str) -> None:
        """Free a program's memory as soon as no sequence uses it."""
        self._programs.drop(program_id)

    def step(self) -> list[RequestOutput]:
        """Schedule, run, sample. Returns what became of requests since the last step."""
        self._receive_loads()
        schedule = self.scheduler.schedule()
        if schedule.items:
            started = time.monotonic()
            batch = pack(schedule, self.blocks.block_size, self._device)
            self._run(schedule, batch)
            adapters = len({slot for slot, _, _ in batch.token_slots if slot})
            self._last_step = (time.monotonic() - started, len(batch.items), adapters)
            self._counters["steps"] += 1
        outputs, self._outputs = self._outputs, []
        return outputs

    def take_events(self) -> list[ProgramEvent]:
        """Program state changes since the last call."""
        return self._programs.take_events()

    def stats(self) -> EngineStats:
        """A snapshot between two steps."""
        return EngineStats(
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            waiting_for_adapter=self._programs.num_waiting,
            kv_blocks_total=self.blocks.num_usable,
            kv_blocks_used=self.blocks.num_used,
            kv_blocks_cached=self.blocks.num_cached,
            bank_bytes_total=self.bank.capacity_bytes,
            bank_bytes_used=self.bank.used_bytes,
            host_bytes_used=self.loader.used_bytes,
            slots_total=self.bank.max_slots,
            slots_used=self.bank.num_slots_used,
            slots_pinned=self.bank.num_slots_pinned,
            counters={**self._counters, "preemptions": self.scheduler.num_preemptions},
            last_step_seconds=self._last_step[0],
            last_step_rows=self._last_step[1],
            last_step_adapters=self._last_step[2],
        )

    def close(self) -> None:
        self.loader.close()

    def _problem(self, request: Request) -> RequestError | None:
        """What the engine cannot run, checked here once more whatever the edge has checked."""
        length, limit = len(request.prompt_token_ids), self.info.max_model_len
        if request.request_id in self._sequences:
            return RequestError("duplicate_request", f"request {request.request_id} is already running")
        if not length:
            return RequestError("empty_prompt", "the prompt has no tokens")
        if length >= limit:
            return RequestError(
                "prompt_too_long", f"the prompt has {length} tokens; with one to generate, at most {limit - 1} fit"
            )
        outside = [token for token in request.prompt_token_ids if not 0 <= token < self.info.vocab_size]
        if outside:
            return RequestError("invalid_token_id", f"token id {outside[0]} is outside the vocabulary of {self.info.vocab_size}")
        return None

    def _queue(self, sequence: Sequence) -> None:
        """Queue a sequence whose program is at hand, unless the program's prologue leaves too little room for its prompt."""
        length, virtual = len(sequence.token_ids), sequence.num_prologue
        room = max(self.info.max_model_len - virtual - 1, 0)
        if length <= room:
            self.scheduler.add(sequence)
            return
        message = f"the prompt has {length} tokens; with the adapter's {virtual} virtual tokens and one to generate, {room} fit"
        self._end(sequence, _failed(sequence.request.request_id, RequestError("prompt_too_long", message)))

    def _receive_loads(self) -> None:
        """Queue the sequences whose programs have come, and fail those whose programs cannot be had."""
        arrivals = self._programs.arrivals()
        for sequence in arrivals.ready:
            self._queue(sequence)
        if arrivals.failed:
            for sequence in list(self._sequences.values()):
                problem = arrivals.failed.get(sequence.program.program_id)
                if problem is not None and sequence not in self.scheduler.running:
                    self._end(sequence, _failed(sequence.request.request_id, problem))

    def _run(self, schedule: Schedule, batch: Batch) -> None:
        try:
            result = self._runner.run(batch)
        except (RuntimeError, MemoryError, ValueError, TypeError, IndexError) as error:
            self._run_apart(schedule, error)
            return
        self._finish_step(batch, result)

    def _run_apart(self, schedule: Schedule, error: BaseException) -> None:
        """A step raised: run its items one by one, so that only those that raise alone fail."""
        log.exception("a step of %d sequences failed", len(schedule.items), exc_info=error)
        new_blocks = schedule.new_blocks
        for item in schedule.items:
            batch = pack(Schedule([item], new_blocks), self.blocks.block_size, self._device)
            new_blocks = []
            try:
                result = self._runner.run(batch)
            except (RuntimeError, MemoryError, ValueError, TypeError, IndexError):
                log.exception("request %s failed alone", item.sequence.request.request_id)
                self._fail_row(item.sequence, RequestError("internal_error", "the engine failed on this request"))
                continue
            self._finish_step(batch, result)

    def _finish_step(self, batch: Batch, result: StepResult) -> None:
        sampled: list[tuple[Sequence, int]] = []
        row = 0
        for item, samples, finite in zip(batch.items, batch.item_samples, result.finite, strict=True):
            if not finite:
                error = RequestError("non_finite_output", "the computation overflowed for this request's adapter and prompt")
                self._fail_row(item.sequence, error)
            else:
                self._advance(item, result.logits[row : row + samples])
                if item.samples:
                    sampled.append((item.sequence, row + samples - 1))
            row += samples
        if sampled:
            sequences = [sequence for sequence, _ in sampled]
            rows = [index for _, index in sampled]
            logits = result.logits if len(rows) == result.logits.shape[0] else result.logits[rows]
            tokens = sample(logits, sequences, self.info.eos_token_ids)
            asked = [index for index, item in enumerate(sequences) if item.request.params.logprobs is not None]
            logprobs = dict(zip(asked, self._logprobs(logits, sequences, tokens, asked), strict=True))
            for index, (sequence, token) in enumerate(zip(sequences, tokens, strict=True)):
                self._accept(sequence, token, logprobs.get(index))

    def _logprobs(
        self, logits: torch.Tensor, sequences: list[Sequence], tokens: list[int], asked: list[int]
    ) -> list[TokenLogprob]:
        if not asked:
            return []
        tops = [sequences[index].request.params.logprobs or 0 for index in asked]
        return log_probabilities(logits[asked], [tokens[index] for index in asked], tops)

    def _advance(self, item: Scheduled, logits: torch.Tensor) -> None:
        """The K/V of the item's tokens is known to be good: count it, and let others share full blocks."""
        sequence, end = item.sequence, item.start + item.count
        first = max(item.start, sequence.num_prologue)
        self._counters["prompt_tokens"] += max(0, min(end, sequence.num_prompt) - first)
        sequence.num_computed = end
        hashes = sequence.full_block_hashes(self.blocks.block_size)
        for index in range(sequence.num_registered, end // self.blocks.block_size):
            self.blocks.register(sequence.block_table[index], hashes[index])
        sequence.num_registered = end // self.blocks.block_size
        if sequence.wants_prompt_logprobs and first < (last := min(end, sequence.num_prompt - 1)):
            targets = sequence.tokens_between(first + 1, last + 1)
            top = sequence.request.params.prompt_logprobs or 0
            sequence.prompt_logprobs += log_probabilities(logits[: len(targets)], targets, [top] * len(targets))

    def _accept(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        params = sequence.request.params
        is_first = sequence.num_output == 0
        stops = token in params.stop_token_ids or (token in self.info.eos_token_ids and not params.ignore_eos)
        reason = FinishReason.STOP if stops else None
        if not stops:
            sequence.token_ids.append(token)
            self._counters["generated_tokens"] += 1
            if sequence.num_output >= params.max_tokens or sequence.num_tokens >= self.info.max_model_len:
                reason = FinishReason.LENGTH
        if is_first:
            self._counters["cached_tokens"] += sequence.num_cached
        output = RequestOutput(
            request_id=sequence.request.request_id,
            token_ids=() if stops else (token,),
            logprobs=() if stops or logprob is None else (logprob,),
            prompt_logprobs=(None, *sequence.prompt_logprobs) if is_first and sequence.wants_prompt_logprobs else None,
            num_cached_tokens=sequence.num_cached,
            finish_reason=reason,
            stop_token_id=token if stops else None,
            stop_logprob=logprob if stops else None,
        )
        if reason is None:
            self._outputs.append(output)
        else:
            self._end(sequence, output)

    def _fail_row(self, sequence: Sequence, error: RequestError) -> None:
        self._counters["failed_rows"] += 1
        self._end(sequence, _failed(sequence.request.request_id, error))

    def _end(self, sequence: Sequence, output: RequestOutput) -> None:
        del self._sequences[sequence.request.request_id]
        self._programs.leave(sequence)
        self.scheduler.remove(sequence)
        self._outputs.append(output)


def _failed(request_id: str, error: RequestError | None) -> RequestOutput:
    return RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=error)


def _num_blocks(settings: EngineSettings, base: BaseModel) -> int:
    """Blocks that the K/V budget buys, the null block included, and no more than could ever be used."""
    size = KVCache.block_bytes(base.num_layers, settings.block_size, base.kv_heads, base.head_dim, DTYPES[settings.dtype])
    affordable = settings.kv_cache_bytes // size
    longest = min(settings.max_model_len or base.max_positions, base.max_positions)
    useful = settings.max_running * -(-longest // settings.block_size) + 1
    if affordable < 2:
        raise ValueError(f"kv_cache_bytes={settings.kv_cache_bytes} holds {affordable} blocks of {size} bytes; 2 are the minimum")
    return min(affordable, useful)
