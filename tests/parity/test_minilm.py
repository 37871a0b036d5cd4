"""The real MiniLM with the example heads: packed in one batch, equal to transformers and PEFT in fp32."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from examples.classify import SENTENCES
from examples.train_heads import base_directory
from server.engine.types import ProgramRef, Task
from tests.harness import ask, load_base_for_lowering, lower_directory, make_encoder, run

HEADS = Path(__file__).parents[2] / "examples" / "heads"
TOLERANCE = 1e-4


def lowered(directory: Path) -> dict[str, ProgramRef]:
    base = load_base_for_lowering(base_directory())
    programs = {}
    for head in sorted(HEADS.iterdir()):
        shutil.copytree(head, directory / head.name)
        programs[head.name] = lower_directory(directory / head.name, base, head.name)
    return programs


@torch.inference_mode()
def test_heads_and_vectors_packed_equal_the_libraries(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_directory())
    prompts = [tokenizer(text)["input_ids"] for text in SENTENCES]
    programs = lowered(tmp_path)
    assert set(programs) == {"tone", "topic", "intent"}
    engine = make_encoder(base_directory(), bank_bytes=64 << 20)
    requests = [ask(f"{name}-{index}", ids, ref) for name, ref in programs.items() for index, ids in enumerate(prompts)]
    results = run(engine, [*requests, *(ask(f"base-{index}", ids, task=Task.EMBED) for index, ids in enumerate(prompts))])
    engine.close()
    backbone = AutoModel.from_pretrained(base_directory()).eval()
    labels = json.loads((HEADS / "tone" / "labels.json").read_text())
    wrapped = AutoModelForSequenceClassification.from_pretrained(base_directory(), num_labels=len(labels))
    tone = PeftModel.from_pretrained(wrapped, HEADS / "tone").eval()
    for index, ids in enumerate(prompts):
        tokens = torch.tensor([ids])
        mean = backbone(input_ids=tokens).last_hidden_state[0].mean(0, keepdim=True)
        expected = {"base": torch.nn.functional.normalize(mean, dim=-1), "tone": tone(input_ids=tokens).logits}
        for name in ("topic", "intent"):
            weights = load_file(HEADS / name / "adapter_model.safetensors")
            x = mean @ weights["0.weight"].T + weights["0.bias"]
            expected[name] = x if name == "topic" else x.relu() @ weights["1.weight"].T + weights["1.bias"]
        for name, rows in expected.items():
            difference = (results[f"{name}-{index}"].rows - rows).abs().max()
            assert float(difference) <= TOLERANCE * max(1.0, float(rows.abs().max())), name
