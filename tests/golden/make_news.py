"""Record what AdapterHub makes of the example ``examples/adapters/news`` on the real SmolLM2: part of ``make golden``, never of ``make test``.

    news/expected.safetensors   for question ``i`` its prompt's ids ``prompt.i``, the ids that follow greedily ``greedy.i``, and where each
                                was made the logits ``logits.i`` of the token ids ``ids``, a few hundred spread over the vocabulary

Outputs come from forward passes without a cache and with eager attention, as in ``make_golden``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import adapters
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from examples.lessons import load_tokenizer, prompt_ids

HERE = Path(__file__).parent
QUESTIONS = ("What is a rainbow?", "Who was Ada Lovelace?")
TOKENS, STRIDE = 16, 97


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path(".medley/bases/SmolLM2-135M-Instruct"), help="the converted base model")
    base = parser.parse_args().base
    tokenizer = load_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float32, attn_implementation="eager")
    adapters.init(model)
    model.set_active_adapters(model.load_adapter(str(HERE.parents[1] / "examples/adapters/news"), use_safetensors=True))
    model.eval()
    ids = torch.arange(0, model.config.vocab_size, STRIDE)
    recorded = {"ids": ids}
    for index, question in enumerate(QUESTIONS):
        prompt = prompt_ids(tokenizer, question)
        sequence, logits = list(prompt), []
        for _ in range(TOKENS):
            last = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0, -1]
            logits.append(last[ids])
            sequence.append(int(last.argmax()))
        recorded |= {
            f"prompt.{index}": torch.tensor(prompt),
            f"greedy.{index}": torch.tensor(sequence[len(prompt) :]),
            f"logits.{index}": torch.stack(logits),
        }
    (HERE / "news").mkdir(exist_ok=True)
    save_file(recorded, HERE / "news/expected.safetensors")


if __name__ == "__main__":
    main()
