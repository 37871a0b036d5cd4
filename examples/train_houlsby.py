"""Trains the example of a bottleneck adapter (Houlsby et al. 2019) with AdapterHub's library.

    python -m examples.train_houlsby

Runs in an environment with ``adapters==1.3.0`` (``make .venv-adapters/.ready`` makes one), which pins an older transformers than the server's.
Needs the converted base model, which ``make demo`` leaves in ``.medley``. Writes ``examples/adapters/news``, in bfloat16, below 1 MB.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import adapters
import torch
from adapters import DoubleSeqBnConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from examples.lessons import PUBLIC_NAME, fit, lesson, load_tokenizer

NAME = "news"
REDUCTION = 144
"""Four inner units at each of the sixty places."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bottleneck example.")
    parser.add_argument("--base", type=Path, default=Path(".medley/bases/SmolLM2-135M-Instruct"), help="the converted base model")
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.base)
    pairs = lesson(NAME, arguments.base, tokenizer)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(arguments.base, torch_dtype=torch.float32)
    adapters.init(model)
    model.add_adapter(NAME, config=DoubleSeqBnConfig(reduction_factor=REDUCTION))
    model.train_adapter(NAME)
    fit(model, tokenizer, pairs, steps=120, rate=5e-3)
    directory = Path(__file__).parent / "adapters" / NAME
    model.save_adapter(str(directory), NAME, with_head=False, use_safetensors=True)
    weights = directory / "adapter.safetensors"
    save_file({key: tensor.to(torch.bfloat16).contiguous() for key, tensor in load_file(weights).items()}, weights)
    config = json.loads((directory / "adapter_config.json").read_text())
    config["model_name"] = PUBLIC_NAME
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
