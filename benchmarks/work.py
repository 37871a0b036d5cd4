"""The work that every engine gets: the same prompts. Its adapters: ``method_adapters``."""

from __future__ import annotations

import random

REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 32, 64, 64


def prompts(vocab_size: int, *, seed: int) -> list[list[int]]:
    """Random token ids, different for every seed, so that no prefix cache helps."""
    rng = random.Random(seed)
    return [[rng.randrange(100, vocab_size - 100) for _ in range(PROMPT_TOKENS)] for _ in range(REQUESTS)]
