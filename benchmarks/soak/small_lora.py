"""LoRA adapters on the query and value projections of every layer: small, cheap to make, each number other bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from benchmarks.method_adapters import Shapes

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_TARGETS = ("q_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class SmallLora:
    """Adapters of one kind for one base. Their safetensors files have the same ``header``; only the ``count`` half-precision numbers after it
    differ, normally distributed with standard deviation ``scale``."""

    config: bytes
    header: bytes
    count: int
    scale: float

    @classmethod
    def of(cls, base: Path, *, rank: int, scale: float) -> SmallLora:
        """The kind of this rank for a Llama base."""
        shapes = Shapes.read(base)
        tensors: dict[str, np.ndarray] = {}
        for layer in range(shapes.layers):
            for target in _TARGETS:
                inputs, outputs = shapes.linears[f"self_attn.{target}"]
                key = f"base_model.model.model.layers.{layer}.self_attn.{target}"
                tensors[f"{key}.lora_A.weight"] = np.zeros((rank, inputs), np.float16)
                tensors[f"{key}.lora_B.weight"] = np.zeros((outputs, rank), np.float16)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "target_modules": list(_TARGETS)}
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        return cls(json.dumps(config).encode(), save(tensors)[:-nbytes], nbytes // 2, scale)

    def files(self, number: int) -> dict[str, bytes]:
        """The files of one adapter as PEFT would save them, by name."""
        numbers = np.random.default_rng(number).standard_normal(self.count, np.float32) * self.scale
        return {CONFIG: self.config, WEIGHTS: self.header + numbers.astype(np.float16).tobytes()}


def write_files(directory: Path, files: Mapping[str, bytes]) -> Path:
    """An adapter's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory
