"""Trains the example adapters that PEFT has a method for: small adapters on SmolLM2 whose effect a person sees at once.

    python -m examples.train [NAME …]

The base model answers a list of questions, and each adapter learns to give those answers in its own style (see ``lessons``), each by a
method of its own. A few minutes each on two CPU cores. Writes ``examples/adapters/NAME`` in PEFT's format, in bfloat16, below 1 MB.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from examples.lessons import PUBLIC_NAME, fit, lesson, load_tokenizer
from server.engine.base_dir import prepare_base

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Course:
    """How one adapter is trained."""

    config: Callable[[], Any]
    steps: int = 70
    rate: float = 2e-3


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")


COURSES = {
    "pirate": Course(lora),
    "shout": Course(lora),
    "json": Course(lora),
    "sparkle": Course(lora),
    "robot": Course(lambda: PrefixTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"), steps=160, rate=3e-2),
    "letter": Course(lambda: PromptTuningConfig(num_virtual_tokens=16, task_type="CAUSAL_LM"), steps=200, rate=5e-2),
    "tale": Course(lambda: IA3Config(task_type="CAUSAL_LM"), steps=160, rate=3e-2),
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
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), course.config())
        print(f"training {name}")
        fit(model, tokenizer, lesson(name, base, tokenizer), steps=course.steps, rate=course.rate)
        save(model, HERE / "adapters" / name)


def save(model: Any, directory: Path) -> None:
    """PEFT's files, in bfloat16, without this machine's paths."""
    model.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)
    weights = directory / "adapter_model.safetensors"
    save_file({key: tensor.to(torch.bfloat16).contiguous() for key, tensor in load_file(weights).items()}, weights)
    config = json.loads((directory / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = PUBLIC_NAME
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
