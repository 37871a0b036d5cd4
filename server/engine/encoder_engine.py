"""The engine of encoders: whole sequences, all their tokens at once, no K/V and no chunks. Otherwise as the decoders' engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from server.adapters.kernels import Kernel
from server.adapters.packed import PrologueLayout
from server.engine.encoder_batch import EncoderBatch, Whole, pack_whole
from server.engine.encoder_runner import EncoderRunner
from server.engine.fair_queue import INPUT_PRICE, FairQueue
from server.engine.lifecycle import NON_FINITE, Lifecycle
from server.engine.pooling import Pooled
from server.engine.sequence import Sequence, SequenceState
from server.engine.settings import EngineSettings
from server.engine.types import EngineStats

_NO_PROLOGUE = PrologueLayout()


class EncoderEngine(Lifecycle[Whole, tuple[EncoderBatch, list[Pooled | None]]]):
    """A step takes as many waiting sequences as fit into ``max_batch_tokens``, at least one, and all of them end with it."""

    def __init__(
        self,
        settings: EngineSettings,
        *,
        wake: Callable[[], None] = lambda: None,
        kernel: Kernel | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(settings, wake=wake, kernel=kernel, clock=clock)
        self._max_batch_tokens = settings.max_batch_tokens
        self._max_running = settings.max_running
        self._queue = FairQueue()
        self._runner = EncoderRunner(self._base, self.bank, kernel=self._kernels.edits)

    @property
    def has_runnable(self) -> bool:
        """Whether ``step`` has something to do now. Sequences that wait for a program or for its room do not count: ``wake`` tells of loads,
        and to look at the rest a few times a second is enough."""
        return bool(self._outputs) or self._programs.has_pending or (len(self._queue) > 0 and not self._is_stuck)

    def stats(self) -> EngineStats:
        """A snapshot between two steps."""
        return replace(super().stats(), waiting=len(self._queue))

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        self._queue.add(sequence)

    def _dequeue(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.WAITING:
            self._queue.remove(sequence)
        self._programs.unpin(sequence)
        sequence.state = SequenceState.FINISHED

    def _taken(self, sequence: Sequence) -> int:
        # Positions run out here, and nothing else; not every prologue takes any.
        return sequence.position_shift

    def _choose(self) -> list[Whole]:
        chosen: list[Whole] = []
        budget = self._max_batch_tokens
        for sequence in self._queue.candidates():
            if len(chosen) == self._max_running or (chosen and sequence.num_rows > budget):
                break
            if not self._programs.pin(sequence):
                continue
            self._queue.charge(sequence.tenant, sequence.num_rows * INPUT_PRICE)
            self._queue.remove(sequence)
            sequence.state = SequenceState.RUNNING
            chosen.append(Whole(sequence, self.bank.resident(sequence.slot).prologue if sequence.slot else _NO_PROLOGUE))
            budget -= sequence.num_rows
        return chosen

    def _compute(self, work: list[Whole]) -> tuple[EncoderBatch, list[Pooled | None]]:
        batch = pack_whole(work, self._base.spec.position_offset, self._device)
        return batch, self._runner.run(batch)

    def _finish(self, computed: tuple[EncoderBatch, list[Pooled | None]]) -> None:
        batch, results = computed
        for span, pooled in zip(batch.spans, results, strict=True):
            self._counters["prompt_tokens"] += len(span.sequence.token_ids)
            if pooled is None:
                self._fail_row(span.sequence, NON_FINITE)
            else:
                self._answer(span.sequence, pooled)
