"""PEFT's mixed batches on the same work: ``generate`` with ``adapter_names``, in a process of its own.

python -m benchmarks.with_peft BASE ADAPTERS DTYPE REPEATS   prints one JSON object {variant: [tokens/s, …]}
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, logging

from benchmarks.work import NEW_TOKENS, prompts

VARIANTS = (0, 1, 8, 32)


def main() -> None:
    base, directory, dtype, repeats = Path(sys.argv[1]), Path(sys.argv[2]), getattr(torch, sys.argv[3]), int(sys.argv[4])
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    vocab = model.config.vocab_size
    results = {"base": [_generate(model, vocab, seed, {}) for seed in range(repeats)]}
    names = [f"lora-{number}" for number in range(max(VARIANTS))]
    for name in names:
        if isinstance(model, PeftModel):
            model.load_adapter(directory / name, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, directory / name, adapter_name=name).eval()
    for count in VARIANTS[1:]:
        runs = []
        for seed in range(repeats):
            chosen = [names[index % count] for index in range(32)]
            runs.append(_generate(model, vocab, seed, {"adapter_names": chosen}))
        results[str(count)] = runs
    sys.stdout.write(json.dumps(results) + "\n")


@torch.inference_mode()
def _generate(model: Any, vocab: int, seed: int, extra: dict[str, Any]) -> float:
    ids = torch.tensor(prompts(vocab, seed=seed))
    started = time.perf_counter()
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=NEW_TOKENS,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        **extra,
    )
    return float((made.shape[1] - ids.shape[1]) * ids.shape[0] / (time.perf_counter() - started))


if __name__ == "__main__":
    main()
