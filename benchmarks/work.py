"""The work that every engine gets: workloads and their variants, as prompts and the adapters that answer them. Standard library only.

What a variant's adapters are is ``adapters``' business; here they are names of directories, and None is the base.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 32, 64, 64
BASE, SINGLE, MIXED_RANK, MIXED_METHOD, ZIPF = "base", "single", "mixed-rank", "mixed-method", "zipf"
W1_VARIANTS = (BASE, "1", "8", "32", MIXED_RANK, MIXED_METHOD, SINGLE)
ZIPF_ADAPTERS, ZIPF_SLOTS = 64, 16
"""Adapters that are asked for, and how many of them the bank holds."""


@dataclass(frozen=True, slots=True)
class Workload:
    """So many requests at once, greedy, with prompts and answers of one length each."""

    name: str
    requests: int
    prompt_tokens: int
    new_tokens: int
    variants: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One run: token ids and the adapter (a directory's path; None: the base) of each request."""

    prompts: Sequence[Sequence[int]]
    adapters: Sequence[str | None]
    new_tokens: int

    @property
    def made(self) -> int:
        """Tokens that the run generates."""
        return len(self.prompts) * self.new_tokens


W1 = Workload("W1", REQUESTS, PROMPT_TOKENS, NEW_TOKENS, W1_VARIANTS)
LONG_PROMPT = Workload("long-prompt", 32, 512, 8, (BASE, "32"))
ZIPFIAN = Workload("zipf", 64, 64, 32, (BASE, ZIPF))
WORKLOADS = {workload.name: workload for workload in (W1, LONG_PROMPT, ZIPFIAN)}


def prompts(vocab_size: int, *, seed: int, requests: int = REQUESTS, tokens: int = PROMPT_TOKENS) -> list[list[int]]:
    """Random token ids, different for every seed, so that no prefix cache helps."""
    rng = random.Random(seed)
    return [[rng.randrange(100, vocab_size - 100) for _ in range(tokens)] for _ in range(requests)]


def job(workload: Workload, variant: str, adapters: Mapping[str, Sequence[str]], *, vocab_size: int, seed: int) -> Job:
    """The run of a variant. ``adapters`` are the directories of each; all engines get the same job for the same seed."""
    requests = 1 if variant == SINGLE else workload.requests
    work = prompts(vocab_size, seed=seed, requests=requests, tokens=workload.prompt_tokens)
    named: Sequence[str | None] = [None] if variant in (BASE, SINGLE) else adapters[variant]
    if variant == MIXED_METHOD:
        named = [*named, None]
    if variant == ZIPF:
        weights = [1 / rank for rank in range(1, len(named) + 1)]
        chosen: list[str | None] = random.Random(seed).choices(named, weights, k=requests)
    else:
        chosen = [named[index % len(named)] for index in range(requests)]
    return Job(work, chosen, workload.new_tokens)
