"""The engine of encoders: whole sequences, all their tokens at once, no K/V and no chunks. Otherwise as the decoders' engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Many
from pathlib import Path

import torch

from server.adapters.kernels import Kernel
from server.adapters.packed import PrologueLayout
from server.engine.encoder_batch import EncoderBatch, pack_whole
from server.engine.encoder_runner import EncoderRunner
from server.engine.fair_queue import FairQueue
from server.engine.lifecycle import NON_FINITE, Lifecycle, load_kernel
from server.engine.model import load_base
from server.engine.sequence import Sequence
from server.engine.settings import EngineSettings
from server.engine.types import EngineInfo, EngineStats, RequestError, RequestOutput, Task

_NO_PROLOGUE = PrologueLayout()

log = logging.getLogger(__name__)


class EncoderEngine(Lifecycle):
    """Owns the device: base model and bank. ``wake`` is called from another thread when a load ends.

    A step takes as many waiting sequences as fit into ``max_batch_tokens``, at least one, and all of them end with it. ``kernel``
    forces one low-rank kernel, for tests that compare the fast ones with the reference.
    """

    def __init__(
        self, settings: EngineSettings, *, wake: Callable[[], None] = lambda: None, kernel: Kernel | None = None
    ) -> None:
        if settings.threads:
            torch.set_num_threads(settings.threads)
        base = load_base(Path(settings.model_dir), settings.base_digest, settings.dtype, settings.device)
        super().__init__(settings, base, wake)
        self._max_batch_tokens = settings.max_batch_tokens
        self._max_running = settings.max_running
        self._position_offset = base.spec.position_offset
        self._queue = FairQueue()
        self._running: list[Sequence] = []
        self._is_stuck = False
        self.info = EngineInfo(
            model_name=settings.model_name,
            base_digest=settings.base_digest,
            dtype=settings.dtype,
            max_model_len=min(settings.max_model_len or base.max_positions, base.max_positions),
            vocab_size=base.spec.vocab_size,
            eos_token_ids=(),
            block_size=0,
            num_blocks=0,
            base_spec=base.spec.to_json(),
            tasks=(Task.CLASSIFY, *((Task.EMBED,) if base.embedding else ())),
        )
        self._runner = EncoderRunner(base, self.bank, kernel=load_kernel(settings, kernel))

    @property
    def has_runnable(self) -> bool:
        """Whether ``step`` has something to do now. Sequences that only wait for a program do not count: ``wake`` tells of those."""
        return bool(self._outputs) or (len(self._queue) > 0 and not (self._is_stuck and self.loader.is_loading))

    def step(self) -> list[RequestOutput]:
        """Take sequences, run them, answer. Returns what became of requests since the last step."""
        self._receive_loads()
        chosen = self._choose()
        self._is_stuck = not chosen
        if chosen:
            started = time.monotonic()
            self._running = [sequence for sequence, _ in chosen]
            adapters = len({sequence.slot for sequence in self._running if sequence.slot})
            self._run(chosen)
            self._running = []
            self._last_step = (time.monotonic() - started, len(chosen), adapters)
            self._counters["steps"] += 1
        outputs, self._outputs = self._outputs, []
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot between two steps."""
        return EngineStats(
            waiting=len(self._queue),
            waiting_for_adapter=self._programs.num_waiting,
            bank_bytes_total=self.bank.capacity_bytes,
            bank_bytes_used=self.bank.used_bytes,
            host_bytes_used=self.loader.used_bytes,
            slots_total=self.bank.max_slots,
            slots_used=self.bank.num_slots_used,
            slots_pinned=self.bank.num_slots_pinned,
            counters=dict(self._counters),
            last_step_seconds=self._last_step[0],
            last_step_rows=self._last_step[1],
            last_step_adapters=self._last_step[2],
        )

    def _enqueue(self, sequence: Sequence) -> None:
        self._queue.add(sequence)

    def _dequeue(self, sequence: Sequence) -> None:
        self._queue.remove(sequence)
        self._programs.unpin(sequence)

    def _taken(self, sequence: Sequence) -> int:
        # Positions run out here, and nothing else; not every prologue takes any.
        return sequence.position_shift

    def _is_running(self, sequence: Sequence) -> bool:
        return sequence in self._running

    def _choose(self) -> list[tuple[Sequence, PrologueLayout]]:
        """The next step's sequences with what they start with, their programs pinned."""
        chosen: list[tuple[Sequence, PrologueLayout]] = []
        budget = self._max_batch_tokens
        for sequence in self._queue.candidates():
            rows = sequence.num_tokens - sequence.num_prologue_kv
            if len(chosen) == self._max_running or (chosen and rows > budget):
                break
            if not self._programs.pin(sequence):
                continue
            self._queue.charge(sequence)
            self._queue.remove(sequence)
            chosen.append((sequence, self.bank.resident(sequence.slot).prologue if sequence.slot else _NO_PROLOGUE))
            budget -= rows
        return chosen

    def _run(self, chosen: Many[tuple[Sequence, PrologueLayout]]) -> None:
        try:
            self._finish(self._pack(chosen))
        except (RuntimeError, MemoryError, ValueError, TypeError, IndexError) as error:
            # Run them one by one, so that only those that raise alone fail.
            log.exception("a step of %d sequences failed", len(chosen), exc_info=error)
            for sequence, prologue in chosen:
                if sequence.request.request_id in self._sequences:
                    self._run_alone(sequence, prologue)

    def _run_alone(self, sequence: Sequence, prologue: PrologueLayout) -> None:
        try:
            self._finish(self._pack([(sequence, prologue)]))
        except (RuntimeError, MemoryError, ValueError, TypeError, IndexError):
            log.exception("request %s failed alone", sequence.request.request_id)
            self._fail_row(sequence, RequestError("internal_error", "the engine failed on this request"))

    def _pack(self, chosen: Many[tuple[Sequence, PrologueLayout]]) -> EncoderBatch:
        return pack_whole(chosen, self._position_offset, self._device)

    def _finish(self, batch: EncoderBatch) -> None:
        for span, pooled in zip(batch.spans, self._runner.run(batch), strict=True):
            self._counters["prompt_tokens"] += len(span.sequence.token_ids)
            if pooled is None:
                self._fail_row(span.sequence, NON_FINITE)
            else:
                self._answer(span.sequence, pooled)
