"""Uploads for tests: well-formed ones, and files to spoil."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from adapter_store.staging import StagedAdapter, Staging

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


def weights(seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    return save(
        {"a.lora_A.weight": rng.normal(size=(2, 4)).astype("f4"), "a.lora_B.weight": rng.normal(size=(4, 2)).astype("f4")}
    )


def good(seed: int = 0) -> dict[str, bytes]:
    return {"adapter_config.json": json.dumps(CONFIG).encode(), "adapter_model.safetensors": weights(seed)}


def stage(root: Path, files: dict[str, bytes], *, max_bytes: int = 1 << 24, chunk: int = 7) -> tuple[Staging, StagedAdapter]:
    """Send files in small pieces, as a network would, and finish."""
    staging = Staging(root, max_bytes)
    for name, content in files.items():
        with_writer = staging.open(name)
        for start in range(0, len(content), max(chunk, len(content) // 50)):
            with_writer.write(content[start : start + max(chunk, len(content) // 50)])
        with_writer.close()
    return staging, staging.finish()


def header(entries: Any, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data
