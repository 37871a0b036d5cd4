"""The work that every engine gets: the same prompts, and the same random adapters as PEFT directories."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

REQUESTS, PROMPT_TOKENS, NEW_TOKENS, RANK = 32, 64, 64, 16


def prompts(vocab_size: int, *, seed: int) -> list[list[int]]:
    """Random token ids, different for every seed, so that no prefix cache helps."""
    rng = random.Random(seed)
    return [[rng.randrange(100, vocab_size - 100) for _ in range(PROMPT_TOKENS)] for _ in range(REQUESTS)]


def write_adapters(base: Path, directory: Path, count: int) -> list[Path]:
    """``count`` random LoRA adapters of rank 16 on all linears, as PEFT would save them."""
    config: dict[str, Any] = json.loads((base / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for module, (size_in, size_out) in shapes.items():
                key = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, size_in, generator=generator) * 0.02
                tensors[f"{key}.lora_B.weight"] = torch.randn(size_out, RANK, generator=generator) * 0.02
        path = directory / f"adapter-{number}"
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "adapter_model.safetensors")
        names = sorted({name.rpartition(".")[2] for name in shapes})
        settings = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": RANK,
            "target_modules": names,
            "bias": "none",
            "task_type": "CAUSAL_LM",
        }
        (path / "adapter_config.json").write_text(json.dumps(settings))
        made.append(path)
    return made
