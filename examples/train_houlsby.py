"""Trains the example of a bottleneck adapter (Houlsby et al. 2019) with AdapterHub's library.

    python -m examples.train_houlsby

Runs in an environment with ``adapters==1.3.0`` (``make .venv-adapters/.ready`` makes one), which pins an older transformers than the server's.
Needs the converted base model, which ``make demo`` leaves in ``.medley``. Writes ``examples/adapters/news``, in bfloat16, below 1 MB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import adapters
import torch
from adapters import DoubleSeqBnConfig
from transformers import AutoModelForCausalLM

from examples.lessons import fit, lesson, load_tokenizer, publish

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
    publish(directory, "adapter.safetensors", "model_name")


if __name__ == "__main__":
    main()
