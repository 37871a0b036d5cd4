"""The trained Houlsby example on the real SmolLM2-135M equals AdapterHub's library, packed with base rows, in fp32."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.harness import greedy, load_base_for_lowering, lower_directory, make_engine, run

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4


def test_the_houlsby_example_equals_adapterhub(smollm2: Path, tmp_path: Path) -> None:
    golden = load_file(ROOT / "tests/golden/news/expected.safetensors")
    adapter = shutil.copytree(ROOT / "examples/adapters/news", tmp_path / "news")
    program = lower_directory(adapter, load_base_for_lowering(smollm2), "news")
    engine = make_engine(smollm2, kv_cache_bytes=64 << 20, bank_bytes=64 << 20, max_batch_tokens=256, max_model_len=256)
    prompts = [golden[f"prompt.{index}"].tolist() for index in range(2)]
    asked = [greedy(f"news-{index}", prompt, program, tokens=16) for index, prompt in enumerate(prompts)]
    results = run(engine, [*asked, *(greedy(f"base-{index}", prompt, tokens=16) for index, prompt in enumerate(prompts))])
    engine.close()
    for index in range(2):
        found, expected = results[f"news-{index}"], golden[f"logits.{index}"]
        assert found.tokens == golden[f"greedy.{index}"].tolist()
        difference = (torch.stack(found.logits)[:, golden["ids"]] - expected).abs().max()
        assert float(difference) <= TOLERANCE * max(1.0, float(expected.abs().max()))
        assert results[f"base-{index}"].tokens != found.tokens
