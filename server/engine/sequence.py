"""One request's tokens while the engine works on it. Standard library only.

``num_computed`` chases ``num_tokens``: there is no prefill phase and no decode phase, only how far the K/V has come.

All lengths, starts and ends are kv indices. A program may put ``num_prologue`` pseudo-tokens in front of the real ones: they take kv
indices (blocks, masks, windows), while their share of the positions is ``position_shift``, and they are nobody's tokens otherwise.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from typing import Any

from server.engine.block_manager import chain_hash, root_hash, switch_hash
from server.engine.types import ProgramRef, Request, Task, TokenLogprob

PSEUDO_TOKEN = 0
"""Stands for every pseudo-token in hashes and inputs: what it is follows from the program, which is in the root of the hashes."""


class SequenceState(enum.Enum):
    WAITING_FOR_ADAPTER = enum.auto()
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Sequence:
    """Tokens, blocks and slot of one request.

    ``token_ids`` are the real tokens. ``active_from`` is the kv index from which the program acts: 0 for most programs. Its K/V before
    that index is the base's. The first ``num_prologue_kv`` of the ``num_prologue`` pseudo-tokens are never computed: their K/V is the
    program's own. ``slot`` is the bank slot while running, 0 for the base. ``head_pooling`` is how the program's classifier reads hidden
    states ("" without one), ``pooling`` how this sequence's are read, and ``pooled`` what they have come to so far: the runner's value.
    ``num_told`` tokens of the output have been told to who asked; ``untold_logprobs`` belong to those that have not.
    """

    __slots__ = (
        "active_from",
        "block_table",
        "charged",
        "hashes",
        "head_pooling",
        "num_cached",
        "num_computed",
        "num_prologue",
        "num_prologue_kv",
        "num_registered",
        "num_told",
        "order",
        "pooled",
        "pooling",
        "position_shift",
        "program",
        "prompt_logprobs",
        "random",
        "request",
        "slot",
        "state",
        "token_ids",
        "untold_logprobs",
    )

    def __init__(self, request: Request, order: int) -> None:
        self.request = request
        self.order = order
        self.program: ProgramRef = request.program
        self.token_ids = list(request.prompt_token_ids)
        self.num_prologue = 0
        self.num_prologue_kv = 0
        self.position_shift = 0
        self.num_computed = 0
        self.num_cached = 0
        self.num_registered = 0
        self.num_told = 0
        self.untold_logprobs: list[TokenLogprob] = []
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
    def has_run(self) -> bool:
        """Whether it has been in a step, be it that it was preempted since."""
        return self.charged > 0

    @property
    def num_tokens(self) -> int:
        """The kv index after the last token known so far."""
        return self.num_prologue + len(self.token_ids)

    @property
    def num_rows(self) -> int:
        """How many of them are computed, rather than copied, when none is shared."""
        return self.num_tokens - self.num_prologue_kv

    @property
    def is_decode(self) -> bool:
        """Whether one token is missing, as after each token that was made."""
        return self.num_tokens - self.num_computed == 1

    @property
    def num_prompt(self) -> int:
        """The kv index after the prompt."""
        return self.num_prologue + len(self.request.prompt_token_ids)

    @property
    def num_output(self) -> int:
        return self.num_tokens - self.num_prompt

    @property
    def output_ids(self) -> list[int]:
        """The tokens made so far."""
        return self.token_ids[len(self.request.prompt_token_ids) :]

    def take_untold(self) -> tuple[tuple[int, ...], tuple[TokenLogprob, ...]]:
        """Tokens of the output since the last call, and their log-probabilities where they are asked for."""
        tokens = tuple(self.token_ids[len(self.request.prompt_token_ids) + self.num_told :])
        logprobs = tuple(self.untold_logprobs)
        self.num_told += len(tokens)
        self.untold_logprobs.clear()
        return tokens, logprobs

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.generates and self.request.params.prompt_logprobs is not None

    @property
    def generates(self) -> bool:
        """Whether tokens are made; otherwise the sequence ends with its prompt."""
        return self.request.task is Task.GENERATE

    @property
    def num_shareable(self) -> int:
        """How many kv indices may come from the prefix cache. What is asked for decides which hidden states must be computed."""
        if self.wants_prompt_logprobs or self.pooling == "none":
            return self.num_prologue
        if self.pooling in ("first", "mean"):
            return self.num_prologue_kv
        # The last token's hidden state makes the next token, or the answer.
        return self.num_tokens - 1

    def start_at(self, invocation_tokens: tuple[int, ...]) -> None:
        """Fix where the program starts to act, from the prompt alone, so that preemption cannot move it.

        Without the invocation tokens in the prompt the whole sequence is the base model's.
        """
        if not invocation_tokens:
            return
        width = len(invocation_tokens)
        prompt = self.request.prompt_token_ids
        for start in range(len(prompt) - width, -1, -1):
            if prompt[start : start + width] == invocation_tokens:
                self.active_from = start
                return
        self.program = ProgramRef()

    def start_with(self, num_kv: int, num_virtual: int, position_shift: int) -> None:
        """Put a program's pseudo-tokens in front: first ``num_kv`` that only have K/V, then ``num_virtual`` that are computed."""
        self.num_prologue_kv = num_kv
        self.num_prologue = num_kv + num_virtual
        self.position_shift = position_shift

    def tokens_between(self, start: int, end: int) -> list[int]:
        """The token ids at kv indices ``[start, end)``."""
        pseudo = [PSEUDO_TOKEN] * (min(end, self.num_prologue) - start)
        return pseudo + self.token_ids[max(0, start - self.num_prologue) : max(0, end - self.num_prologue)]

    def positions_between(self, start: int, end: int) -> Iterator[int]:
        """The positions that the model is told for kv indices ``[start, end)``: a virtual token's is its kv index."""
        border = min(max(self.num_prologue, start), end)
        yield from range(start, border)
        shift = self.position_shift - self.num_prologue
        yield from range(border + shift, end + shift)

    def full_block_hashes(self, block_size: int) -> list[bytes]:
        """Hashes of all blocks that the tokens known so far fill, pseudo-tokens included, extended as the sequence grows."""
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
        return chain_hash(parent, self.tokens_between(first, end))

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
