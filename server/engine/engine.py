"""The engine of decoders: schedule, run, sample. Synchronous, in one thread, and the only place where its parts meet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from server.adapters.kernels import Kernel
from server.engine.batch import Batch, pack
from server.engine.block_manager import BlockManager
from server.engine.graphs import GraphLimits
from server.engine.kv_cache import KVCache
from server.engine.lifecycle import NON_FINITE, Lifecycle
from server.engine.model import DTYPES, BaseModel
from server.engine.pacing import Pacing
from server.engine.pooling import Pooled
from server.engine.runner import Runner, StepResult
from server.engine.sampler import log_probabilities, sample
from server.engine.scheduler import Scheduled, Scheduler
from server.engine.sequence import Sequence
from server.engine.settings import EngineSettings
from server.engine.types import EngineStats, FinishReason, RequestOutput, TokenLogprob


class Engine(Lifecycle[Scheduled, tuple[Batch, StepResult]]):
    """The engine of decoders: K/V blocks and a scheduler over them."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        wake: Callable[[], None] = lambda: None,
        kernel: Kernel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(settings, wake=wake, kernel=kernel, clock=clock)
        base = self._base
        num_blocks = _num_blocks(settings, base, self.info.max_model_len)
        capacity = (num_blocks - 1) * settings.block_size
        self.info = replace(
            self.info,
            max_model_len=min(self.info.max_model_len, capacity),
            block_size=settings.block_size,
            num_blocks=num_blocks,
        )
        kernels = self._kernels
        longest = -(-self.info.max_model_len // settings.block_size)
        limits = GraphLimits(settings.max_running, longest, settings.block_size, spare_block=num_blocks)
        graphs = None if kernels.make_graph is None else (kernels.make_graph, limits)
        self.blocks = BlockManager(num_blocks, settings.block_size, prefix_caching=settings.prefix_caching)
        self._cache = KVCache(
            num_layers=base.num_layers,
            num_blocks=num_blocks + (graphs is not None),
            block_size=settings.block_size,
            kv_heads=base.kv_heads,
            head_dim=base.head_dim,
            dtype=DTYPES[settings.dtype],
            device=self._device,
        )
        self._clock = clock
        self._pacing = _pacing(settings)
        self.scheduler = Scheduler(
            self.blocks,
            max_running=settings.max_running,
            max_batch_tokens=settings.max_batch_tokens,
            pin=self._programs.pin,
            unpin=self._programs.unpin,
            pacing=self._pacing,
        )
        self._runner = Runner(base, self._cache, self.bank, kernel=kernels.edits, attention=kernels.attention, graphs=graphs)

    @property
    def has_runnable(self) -> bool:
        """Whether ``step`` has something to do now. Sequences that wait for a program or for its room do not count: ``wake`` tells of loads,
        and to look at the rest a few times a second is enough."""
        is_sure = bool(self._outputs or self.scheduler.running or self._programs.has_pending)
        return is_sure or (self.scheduler.has_work and not self._is_stuck)

    def stats(self) -> EngineStats:
        """A snapshot between two steps."""
        common = super().stats()
        return replace(
            common,
            running=len(self.scheduler.running),
            waiting=self.scheduler.num_waiting,
            kv_blocks_total=self.blocks.num_usable,
            kv_blocks_used=self.blocks.num_used,
            kv_blocks_cached=self.blocks.num_cached,
            counters={**common.counters, "preemptions": self.scheduler.num_preemptions},
        )

    def _enqueue(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)

    def _dequeue(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)

    def _taken(self, sequence: Sequence) -> int:
        return sequence.num_prologue

    def _choose(self) -> list[Scheduled]:
        schedule = self.scheduler.schedule()
        self._cache.zero(schedule.new_blocks)
        return schedule.items

    def _run(self, work: list[Scheduled]) -> None:
        started = self._clock()
        super()._run(work)
        if self._pacing is not None and any(item.count > 1 for item in work):
            self._pacing.observe(sum(item.count for item in work), self._clock() - started)

    def _compute(self, work: list[Scheduled]) -> tuple[Batch, StepResult]:
        batch = pack(work, self.blocks.block_size, self._device)
        return batch, self._runner.run(batch)

    def _finish(self, computed: tuple[Batch, StepResult]) -> None:
        batch, result = computed
        sampled: list[tuple[Sequence, int]] = []
        row = 0
        for item, samples, finite, pooled in zip(batch.items, batch.item_samples, result.finite, result.pooled, strict=True):
            if not finite:
                self._fail_row(item.sequence, NON_FINITE)
            else:
                self._advance(item, result.logits[row : row + samples], pooled)
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

    def _advance(self, item: Scheduled, logits: torch.Tensor, pooled: Pooled | None) -> None:
        """The K/V of the item's tokens is known to be good: count it, let others share full blocks, and end what makes no token."""
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
        if pooled is not None:
            sequence.pooled = pooled
            if item.completes:
                self._counters["cached_tokens"] += sequence.num_cached
                self._answer(sequence, pooled)

    def _accept(self, sequence: Sequence, token: int, logprob: TokenLogprob | None) -> None:
        params = sequence.request.params
        is_first = sequence.num_output == 0
        stops = token in params.stop_token_ids or (token in self.info.eos_token_ids and not params.ignore_eos)
        reason = FinishReason.STOP if stops else None
        if not stops:
            sequence.token_ids.append(token)
            if logprob is not None:
                sequence.untold_logprobs.append(logprob)
            self._counters["generated_tokens"] += 1
            if sequence.num_output >= params.max_tokens or sequence.num_tokens >= self.info.max_model_len:
                reason = FinishReason.LENGTH
        if is_first:
            self._counters["cached_tokens"] += sequence.num_cached
        if reason is None and not is_first and not sequence.request.streams:
            return
        tokens, logprobs = sequence.take_untold()
        output = RequestOutput(
            request_id=sequence.request.request_id,
            token_ids=tokens,
            logprobs=logprobs,
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


def _pacing(settings: EngineSettings) -> Pacing | None:
    if not settings.step_target_s:
        return None
    return Pacing(settings.step_target_s, smallest=settings.block_size, largest=settings.max_batch_tokens)


def _num_blocks(settings: EngineSettings, base: BaseModel, longest: int) -> int:
    """Blocks that the K/V budget buys, the null block included, and no more than could ever be used."""
    size = KVCache.block_bytes(base.num_layers, settings.block_size, base.kv_heads, base.head_dim, DTYPES[settings.dtype])
    affordable = settings.kv_cache_bytes // size
    useful = settings.max_running * -(-longest // settings.block_size) + 1
    if affordable < 2:
        raise ValueError(f"kv_cache_bytes={settings.kv_cache_bytes} holds {affordable} blocks of {size} bytes; 2 are the minimum")
    return min(affordable, useful)
