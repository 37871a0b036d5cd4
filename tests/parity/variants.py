"""The LoRA family's variants as PEFT makes them, with every trainable tensor random, so that nothing is neutral."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model

from tests.parity.shared import clean_model
from tests.tiny import FAMILIES

INVOCATION = [60, 61]


@dataclass(frozen=True)
class Variant:
    """A PEFT configuration. ``embedding``/``head`` stand for the family's module names; ``families`` None: all."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("all-linear",)
    families: tuple[str, ...] | None = None
    with_head: bool = False
    with_embedding: bool = False
    config: type = LoraConfig


WITH_BIASES = ("gpt2", "opt", "qwen2")
VARIANTS = (
    Variant("plain"),
    Variant("rslora", {"use_rslora": True}),
    Variant("patterns", {"rank_pattern": {"PATTERN": 2}, "alpha_pattern": {"PATTERN": 3}}),
    Variant("one-layer", {"layers_to_transform": [1]}),
    Variant("bias-lora-only", {"bias": "lora_only"}, families=WITH_BIASES),
    Variant("bias-all", {"bias": "all"}, families=WITH_BIASES),
    Variant("lora-bias", {"lora_bias": True}),
    Variant("dora", {"use_dora": True}),
    Variant("embedding", with_embedding=True),
    Variant("embedding-dora", {"use_dora": True}, with_embedding=True, families=("llama", "qwen2")),
    Variant("head", with_head=True, families=("llama", "mistral", "qwen3", "phi3")),
    Variant("token-rows", {"trainable_token_indices": [7, 5, 200]}),
    Variant("saved-head", {"modules_to_save": ["HEAD"]}, families=("llama", "mistral", "qwen3", "phi3")),
    Variant("saved-embedding", {"modules_to_save": ["EMBEDDING"]}, families=("llama", "mistral", "qwen3", "phi3")),
    Variant("saved-norm", {"modules_to_save": ["NORM"]}, families=("llama", "gemma2", "gpt2")),
    Variant("pissa", {"init_lora_weights": "pissa"}),
    # On Conv1D PEFT's OLoRA writes matrices of transposed shapes, which PEFT cannot load either.
    Variant("olora", {"init_lora_weights": "olora"}, families=tuple(name for name in FAMILIES if name != "gpt2")),
    # PEFT itself fails on OPT here: its aLoRA layers cannot take the two-dimensional inputs of OPT's fc1.
    Variant("activated", {"alora_invocation_tokens": INVOCATION}, families=tuple(name for name in FAMILIES if name != "opt")),
    Variant("adalora", {"target_r": 3, "init_r": 4, "total_step": 10}, config=AdaLoraConfig),
)


def module_names(model: Any, family: str) -> tuple[str, str, str]:
    """(embedding, head, a norm) by the last part of their names."""
    names = {module: name for name, module in model.named_modules()}
    embedding = names[model.get_input_embeddings()].rpartition(".")[2]
    norm = {"gpt2": "ln_1", "opt": "final_layer_norm"}.get(family, "post_attention_layernorm")
    return embedding, names[model.get_output_embeddings()].rpartition(".")[2], norm


def make_adapter(variant: Variant, family: str, base: Path, directory: Path, *, seed: int = 9, scale: float = 0.15) -> Path:
    """Create, randomise and save an adapter with PEFT."""
    torch.manual_seed(seed)
    model = clean_model(base)
    embedding, head, norm = module_names(model, family)
    first_linear = next(name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D"))
    stand_ins = {"EMBEDDING": embedding, "HEAD": head, "NORM": norm, "PATTERN": first_linear.rpartition(".")[2]}
    settings = {name: _fill(value, stand_ins) for name, value in variant.settings.items()}
    targets: Any = list(variant.targets) if variant.targets != ("all-linear",) else "all-linear"
    linears = sorted(
        {name.rpartition(".")[2] for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")}
        - {head}
    )
    if variant.with_head:
        targets = [*linears, head]
    if variant.with_embedding:
        targets = [linears[0], embedding]
    if "layers_to_transform" in settings or variant.config is AdaLoraConfig:
        targets = linears
    if variant.config is LoraConfig:
        settings = {"r": 4, **settings}
    settings["fan_in_fan_out"] = family == "gpt2"
    config = variant.config(lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **settings)
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        trained = parameter.requires_grad or ("lora_" in name and "ranknum" not in name)
        if trained:
            noise = torch.randn(parameter.shape, generator=generator) * scale
            keeps = any(part in name for part in ("magnitude", "modules_to_save", "base_layer", "norm", "ln_")) or name.endswith(
                ".bias"
            )
            parameter.data = parameter.data + noise if keeps else noise
    peft_model.save_pretrained(directory)
    return directory


def _fill(value: Any, stand_ins: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {stand_ins.get(key, key): item for key, item in value.items()}
    if isinstance(value, list):
        return [stand_ins.get(item, item) if isinstance(item, str) else item for item in value]
    return value
