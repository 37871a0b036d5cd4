"""What the engine process is told at start. Standard library only; the HTTP side derives it from its own settings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Sizes are bytes unless named otherwise; ``max_model_len`` None takes the model's own limit.

    ``max_batch_tokens`` bounds the tokens of one step, ``max_running`` the sequences in it, ``max_waiting`` the queue before
    it. ``bank_bytes`` bounds resident programs on the device, ``host_bytes`` those kept ready in host memory.
    ``threads`` 0 leaves the choice to PyTorch. ``kernel_dir`` keeps compiled kernels; empty: none are built.
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
    max_running: int = 64
    max_waiting: int = 1024
    bank_bytes: int = 1 << 30
    host_bytes: int = 1 << 30
    max_slots: int = 256
    threads: int = 0
    prefix_caching: bool = True
    kernel_dir: str = ""
