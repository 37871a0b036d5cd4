"""The trained example adapters on the real SmolLM2-135M: packed in one batch, equal to PEFT in fp32."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from tests.harness import greedy, load_base_for_lowering, lower_directory, make_engine, run
from tests.parity.equality import load_reference, reference_logits
from tests.parity.shared import unchanged_model
from tests.parity.variants import Variant, make_adapter

EXAMPLES = Path(__file__).parents[2] / "examples" / "adapters"
QUESTIONS = ("What is a rainbow?", "Who was Ada Lovelace?")
TOLERANCE = 1e-4


def test_examples_and_a_dora_packed_equal_peft(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    base = load_base_for_lowering(smollm2)
    adapters = {path.name: path for path in sorted(EXAMPLES.iterdir()) if (path / "adapter_model.safetensors").exists()}
    assert len(adapters) >= 7
    dora = Variant("dora", {"use_dora": True}, targets=("q_proj", "down_proj"))
    adapters["dora"] = make_adapter(dora, "llama", smollm2, tmp_path / "dora", scale=0.02)
    (tmp_path / "programs").mkdir()
    programs = {}
    for name, path in adapters.items():
        copy = tmp_path / "programs" / name
        copy.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (copy / file).write_bytes((path / file).read_bytes())
        programs[name] = lower_directory(copy, base, name)
    prompts = [
        tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True))[
            "input_ids"
        ]
        for text in QUESTIONS
    ]
    engine = make_engine(smollm2, kv_cache_bytes=64 << 20, bank_bytes=256 << 20, max_batch_tokens=256, max_model_len=256)
    requests = [
        greedy(f"{name}-{index}", prompt, ref, tokens=8) for name, ref in programs.items() for index, prompt in enumerate(prompts)
    ]
    results = run(engine, [*requests, *(greedy(f"base-{index}", prompt, tokens=8) for index, prompt in enumerate(prompts))])
    engine.close()
    plain = unchanged_model(smollm2)
    for name in ["base", *programs]:
        reference = plain if name == "base" else load_reference(smollm2, adapters[name])
        for index, prompt in enumerate(prompts):
            result = results[f"{name}-{index}"]
            expected = reference_logits(reference, [*prompt, *result.tokens][:-1], len(prompt))
            difference = (torch.stack(result.logits) - expected).abs().max()
            assert float(difference) <= TOLERANCE * max(1.0, float(expected.abs().max())), name
            assert result.tokens == expected.argmax(-1).tolist(), name
