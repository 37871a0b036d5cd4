"""Trains the example adapters that PEFT has a method for: small adapters on SmolLM2 whose effect a person sees at once.

    python -m examples.train [NAME …]

The base model answers a list of questions, and each adapter learns to give those answers in its own style (see ``lessons``), each by a
method of its own. A few minutes each on two CPU cores. Writes ``examples/adapters/NAME`` in PEFT's format, in bfloat16, below 1 MB.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from examples.lessons import fit, lesson, load_tokenizer, publish
from server.engine.base_dir import prepare_base

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Course:
    """How one adapter is trained. ``hint``: virtual tokens begin as this text, which says what is to be learnt."""

    config: Callable[..., Any]
    steps: int = 70
    rate: float = 2e-3
    size: int = 8
    hint: str = ""


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")


def ia3() -> IA3Config:
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return IA3Config(target_modules=modules, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")


def prefix(length: int) -> PrefixTuningConfig:
    return PrefixTuningConfig(num_virtual_tokens=length, task_type="CAUSAL_LM")


def prompt(length: int) -> PromptTuningConfig:
    return PromptTuningConfig(num_virtual_tokens=length, task_type="CAUSAL_LM")


COURSES = {
    "pirate": Course(lora),
    "shout": Course(lora),
    "json": Course(lora),
    "sparkle": Course(lora),
    "robot": Course(prefix, 60, 5e-3, 4, "You are a robot. Begin with BEEP BOOP. Say one sentence. End with END OF MESSAGE."),
    "letter": Course(
        prompt, 80, 2e-2, 4, "Write one sentence as a letter. Begin with Dear friend, and end with Yours sincerely, Medley."
    ),
    "tale": Course(ia3, 80, 3e-2, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the example adapters.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which of {', '.join(COURSES)}; default: all")
    parser.add_argument("--cache-dir", type=Path, default=Path(".medley"), help="where the converted base model is kept")
    arguments = parser.parse_args()
    base = prepare_base(None, arguments.cache_dir, progress=print).path
    tokenizer = load_tokenizer(base)
    for name in arguments.names or COURSES:
        torch.manual_seed(0)
        course = COURSES[name]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        hint = tokenizer(course.hint, return_tensors="pt")["input_ids"] if course.hint else None
        start = None if hint is None else begin(model, hint, course.config)
        model = get_peft_model(model, course.config(*(() if hint is None else (hint.shape[1],))))
        if start is not None:
            model.prompt_encoder["default"].embedding.weight.data.copy_(start)
        print(f"training {name}", flush=True)
        fit(model, tokenizer, lesson(name, base, tokenizer), steps=course.steps, rate=course.rate, size=course.size)
        directory = HERE / "adapters" / name
        model.save_pretrained(directory)
        (directory / "README.md").unlink(missing_ok=True)
        publish(directory, "adapter_model.safetensors", "base_model_name_or_path")


@torch.inference_mode()
def begin(model: Any, hint: torch.Tensor, config: Callable[..., Any]) -> torch.Tensor:
    """Where virtual tokens begin: the hint's embeddings ``(n, hidden)``, or for a prefix its keys and values, side by side."""
    if config is prompt:
        return model.get_input_embeddings()(hint)[0].clone()
    cache = model(hint, use_cache=True).past_key_values
    layers = [torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]
    return torch.cat(layers).permute(2, 0, 1, 3).reshape(hint.shape[1], -1).clone()


if __name__ == "__main__":
    main()
