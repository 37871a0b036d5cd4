"""One request's tokens while the engine works on it. Standard library only.

``num_computed`` chases ``num_tokens``: there is no prefill phase and no decode phase, only how far the K/V has come.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from typing import Any

from server.engine.block_manager import chain_hash, root_hash, switch_hash
from server.engine.types import ProgramRef, Request, Task, TokenLogprob


class SequenceState(enum.Enum):
    WAITING_FOR_ADAPTER = enum.auto()
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """Tokens, blocks and slot of one request.

    ``active_from`` is the position from which the program acts: 0 for most programs. Its K/V before that position is the
    base's. ``slot`` is the bank slot while running, 0 for the base. ``head_pooling`` is how the program's classifier reads hidden states
    ("" without one), ``pooling`` how this sequence's are read, and ``pooled`` what they have come to so far: a value of the runner's.
    """

    __slots__ = (
        "active_from",
        "block_table",
        "charged",
        "hashes",
        "head_pooling",
        "num_cached",
        "num_computed",
        "num_prompt",
        "num_registered",
        "order",
        "pooled",
        "pooling",
        "program",
        "prompt_logprobs",
        "random",
        "request",
        "slot",
        "state",
        "token_ids",
    )

    def __init__(self, request: Request, order: int) -> None:
        self.request = request
        self.order = order
        self.program: ProgramRef = request.program
        self.token_ids = list(request.prompt_token_ids)
        self.num_prompt = len(self.token_ids)
        self.num_computed = 0
        self.num_cached = 0
        self.num_registered = 0
        self.block_table: list[int] = []
        self.hashes: list[bytes] = []
        self.active_from = 0
        self.slot = 0
        self.charged = 0
        self.state = SequenceState.WAITING if request.program.is_base else SequenceState.WAITING_FOR_ADAPTER
        self.random = random.Random(request.params.seed)  # noqa: S311 - sampling, not cryptography
        self.prompt_logprobs: list[TokenLogprob] = []
        self.head_pooling = ""
        self.pooling = ""
        self.pooled: Any = None

    @property
    def tenant(self) -> str:
        return self.request.tenant

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.generates and self.request.params.prompt_logprobs is not None

    @property
    def generates(self) -> bool:
        """Whether tokens are made; otherwise the sequence ends with its prompt."""
        return self.request.task is Task.GENERATE

    @property
    def needs_every_row(self) -> bool:
        """Whether hidden states before the last are needed, so that nothing may come from the prefix cache."""
        return self.wants_prompt_logprobs or self.pooling in ("first", "mean", "none")

    def start_at(self, invocation_tokens: tuple[int, ...]) -> None:
        """Fix where the program starts to act, from the prompt alone, so that preemption cannot move it.

        Without the invocation tokens in the prompt the whole sequence is the base model's.
        """
        if not invocation_tokens:
            return
        width = len(invocation_tokens)
        prompt = self.token_ids[: self.num_prompt]
        for start in range(self.num_prompt - width, -1, -1):
            if tuple(prompt[start : start + width]) == invocation_tokens:
                self.active_from = start
                return
        self.program = ProgramRef()

    def full_block_hashes(self, block_size: int) -> list[bytes]:
        """Hashes of all blocks that the tokens known so far fill, extended as the sequence grows."""
        for index in range(len(self.hashes), self.num_tokens // block_size):
            self.hashes.append(self._block_hash(index, block_size))
        return self.hashes

    def _block_hash(self, index: int, block_size: int) -> bytes:
        first, end = index * block_size, (index + 1) * block_size
        if index == 0:
            parent = root_hash(self.tenant, "base" if self.active_from else self.program.program_id)
        else:
            parent = self.hashes[-1]
        if self.active_from and first <= self.active_from < end:
            parent = switch_hash(parent, self.program.program_id, self.active_from)
        return chain_hash(parent, self.token_ids[first:end])

    def slots_between(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(slot, start, end) pieces of the token range: the base before ``active_from``, the program after it."""
        border = min(max(self.active_from, start), end)
        if start < border:
            yield 0, start, border
        if border < end:
            yield self.slot, border, end

    def restart(self) -> None:
        """Forget all K/V; the tokens stay, to be computed again."""
        self.block_table = []
        self.num_computed = 0
        self.num_registered = 0
        self.slot = 0
        self.prompt_logprobs = []
        self.pooled = None
