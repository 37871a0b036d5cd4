"""What the engine process is told at start. Standard library only; the HTTP side derives it from its own settings."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

_PINNED_SHARE = 2
"""Explicit pins take at most one part in so many of the bank: the rest is what everybody else lives on."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Sizes are bytes unless named otherwise; ``max_model_len`` None takes the model's own limit.

    ``max_batch_tokens`` bounds the tokens of one step, ``max_running`` the sequences in it, ``max_waiting`` the queue before
    it. While somebody waits for the next token of a stream, prompts get as many tokens as keep a step within ``step_target_s`` seconds;
    0 gives them all of the budget. ``bank_bytes`` bounds resident programs on the device and ``max_slots`` their number, ``host_bytes``
    those kept ready in host memory. ``threads`` 0 leaves the choice to PyTorch. ``kernel_dir`` keeps compiled kernels; empty: none are built.
    """

    model_dir: str
    base_digest: str
    model_name: str = ""
    dtype: str = "float32"
    device: str = "cpu"
    max_model_len: int | None = None
    kv_cache_bytes: int = 1 << 30
    block_size: int = 16
    max_batch_tokens: int = 1024
    step_target_s: float = 0.0
    max_running: int = 64
    max_waiting: int = 1024
    bank_bytes: int = 1 << 30
    host_bytes: int = 1 << 30
    max_slots: int = 1024
    threads: int = 0
    prefix_caching: bool = True
    kernel_dir: str = ""

    def pins_fit(self, sizes: Collection[int]) -> bool:
        """Whether programs of these sizes (bytes) may be pinned explicitly, all of them together."""
        return sum(sizes) <= self.bank_bytes // _PINNED_SHARE and len(sizes) <= self.max_slots // _PINNED_SHARE
