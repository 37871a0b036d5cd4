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
    """Adapters of one kind for one base. ``scale`` is the standard deviation of their numbers, which are stored in half precision."""

    shapes: Shapes
    rank: int
    scale: float

    @classmethod
    def of(cls, base: Path, *, rank: int, scale: float) -> SmallLora:
        return cls(Shapes.read(base), rank, scale)

    def files(self, number: int) -> dict[str, bytes]:
        """The files of one adapter as PEFT would save them, by name."""
        rng = np.random.default_rng(number)
        tensors: dict[str, np.ndarray] = {}
        for layer in range(self.shapes.layers):
            for target in _TARGETS:
                inputs, outputs = self.shapes.linears[f"self_attn.{target}"]
                key = f"base_model.model.model.layers.{layer}.self_attn.{target}"
                tensors[f"{key}.lora_A.weight"] = self._random(rng, self.rank, inputs)
                tensors[f"{key}.lora_B.weight"] = self._random(rng, outputs, self.rank)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": self.rank, "lora_alpha": self.rank, "bias": "none"}
        return {CONFIG: json.dumps({**config, "target_modules": list(_TARGETS)}).encode(), WEIGHTS: save(tensors)}

    def _random(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) * self.scale).astype(np.float16)


def write_files(directory: Path, files: Mapping[str, bytes]) -> Path:
    """An adapter's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory
