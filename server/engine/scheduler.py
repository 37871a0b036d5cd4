"""Who runs in the next step, and with how many tokens. Policy only: standard library, no tensors.

Continuous batching without phases: every running sequence gets the tokens it lacks, under one token budget; those that lack
one token (decodes) come first. While a reader waits for one of them, ``Pacing`` says how much of the budget prompts may use beside them, so
that a long prompt does not stall them. Waiting sequences join in the order of the fair queue. When blocks run out, the sequence that joined
last gives all of its blocks back and is computed again later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from server.engine.block_manager import BlockManager
from server.engine.fair_queue import INPUT_PRICE, OUTPUT_PRICE, FairQueue
from server.engine.pacing import Pacing
from server.engine.sequence import Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Compute tokens ``[start, start + count)`` of the sequence in this step."""

    sequence: Sequence
    start: int
    count: int

    @property
    def completes(self) -> bool:
        """Whether the step reaches the sequence's end."""
        return self.start + self.count == self.sequence.num_tokens

    @property
    def samples(self) -> bool:
        """Whether the step makes a token."""
        return self.completes and self.sequence.generates

    def copied(self, block_size: int) -> range:
        """kv indices whose K/V is to be copied from the program before this step: those of its prefix that no shared block holds.

        A sequence that joins starts right behind what it copies, and no later step starts there.
        """
        sequence = self.sequence
        behind = self.start == sequence.num_prologue_kv
        return range(sequence.num_registered * block_size, self.start) if behind else range(0)


@dataclass(slots=True)
class Schedule:
    """One step's work. ``new_blocks`` have unspecified content and must be zeroed before use."""

    items: list[Scheduled] = field(default_factory=list)
    new_blocks: list[int] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(item.count for item in self.items)


class Scheduler:
    """Queues and the policy over them. ``pin`` and ``unpin`` ask the bank for a sequence's program.

    ``pin(sequence)`` sets ``sequence.slot`` and returns True, or returns False when no room can be made now;
    ``unpin(sequence)`` gives the slot back. Without ``pacing`` every step has the whole ``max_batch_tokens``.
    """

    def __init__(
        self,
        blocks: BlockManager,
        *,
        max_running: int,
        max_batch_tokens: int,
        pin: Callable[[Sequence], bool],
        unpin: Callable[[Sequence], None],
        pacing: Pacing | None = None,
    ) -> None:
        self.blocks = blocks
        self.running: list[Sequence] = []
        self._max_running = max_running
        self._max_batch_tokens = max_batch_tokens
        self._pin = pin
        self._unpin = unpin
        self._pacing = pacing
        self._waiting = FairQueue()
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self.running) or len(self._waiting) > 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence whose program is at hand."""
        sequence.state = SequenceState.WAITING
        self._waiting.add(sequence, self.running)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and give back what it holds."""
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self._give_back(sequence)
        elif sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED

    def schedule(self) -> Schedule:
        """Choose the next step's work and take the blocks for it."""
        schedule = Schedule()
        budget = self._budget()
        # Decodes first; a stable sort keeps the order of joining, which is also the order of protection from preemption.
        for sequence in sorted(self.running, key=lambda item: not item.is_decode):
            if sequence.state is not SequenceState.RUNNING or budget == 0:
                continue
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            if self._grow(sequence, count, schedule):
                schedule.items.append(Scheduled(sequence, sequence.num_computed, count))
                budget -= count
        if not schedule.preempted:
            self._join(schedule, budget)
        for item in schedule.items:
            self._charge(item)
        return schedule

    def _budget(self) -> int:
        """All of the tokens that a step may have, unless a reader would wait for it."""
        decodes = [sequence for sequence in self.running if sequence.is_decode]
        if self._pacing is None or not any(sequence.request.streams for sequence in decodes):
            return self._max_batch_tokens
        return self._pacing.budget(len(decodes))

    def _grow(self, sequence: Sequence, count: int, schedule: Schedule) -> bool:
        """Get blocks for ``count`` more tokens, preempting the youngest until it fits. False: ``sequence`` itself had to go."""
        missing = self._blocks_for(sequence.num_computed + count) - len(sequence.block_table)
        while (blocks := self.blocks.allocate(max(missing, 0))) is None:
            victim = self.running[-1]
            self._preempt(victim, schedule)
            if victim is sequence:
                return False
        sequence.block_table.extend(blocks)
        schedule.new_blocks.extend(blocks)
        return True

    def _preempt(self, sequence: Sequence, schedule: Schedule) -> None:
        schedule.items = [item for item in schedule.items if item.sequence is not sequence]
        self.running.remove(sequence)
        self._give_back(sequence)
        sequence.restart()
        sequence.state = SequenceState.WAITING
        self._waiting.put_back(sequence)
        schedule.preempted.append(sequence)
        self.num_preemptions += 1

    def _join(self, schedule: Schedule, budget: int) -> None:
        for sequence in self._waiting.candidates():
            if budget == 0 or len(self.running) >= self._max_running:
                return
            cached = self._cached_blocks(sequence)
            # Room for the whole sequence, so that a joiner does not preempt, or get preempted, at once.
            need = self._blocks_for(sequence.num_tokens) - len(cached)
            if need > self.blocks.num_free - self.blocks.num_free_among(cached):
                return
            if not self._pin(sequence):
                continue
            self._waiting.remove(sequence)
            self.blocks.share(cached)
            sequence.block_table = list(cached)
            sequence.num_registered = len(cached)
            sequence.num_computed = max(len(cached) * self.blocks.block_size, sequence.num_prologue_kv)
            real = min(sequence.num_computed, sequence.num_prompt) - sequence.num_prologue
            sequence.num_cached = max(sequence.num_cached, real)
            sequence.charged = max(sequence.charged, sequence.num_computed)
            sequence.state = SequenceState.RUNNING
            self.running.append(sequence)
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            self._grow(sequence, count, schedule)
            schedule.items.append(Scheduled(sequence, sequence.num_computed, count))
            budget -= count

    def _cached_blocks(self, sequence: Sequence) -> list[int]:
        hashes = sequence.full_block_hashes(self.blocks.block_size)
        return self.blocks.match(hashes[: sequence.num_shareable // self.blocks.block_size])

    def _charge(self, item: Scheduled) -> None:
        """Recomputed tokens are free: preemption is the engine's choice, not the tenant's."""
        sequence, end = item.sequence, item.start + item.count
        fresh_input = max(0, min(end, sequence.num_prompt) - min(max(sequence.charged, item.start), sequence.num_prompt))
        price = fresh_input * INPUT_PRICE + (OUTPUT_PRICE if item.samples else 0)
        sequence.charged = max(sequence.charged, end)
        self._waiting.charge(sequence.tenant, price)

    def _give_back(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.block_table)
        sequence.block_table = []
        self._unpin(sequence)

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.blocks.block_size)
