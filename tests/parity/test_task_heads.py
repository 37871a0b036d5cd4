"""Classifiers trained with PEFT equal PEFT, on decoders and encoders: logits of sentences and of tokens, in fp32."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from server.engine.types import ProgramRef
from tests.conftest import TinyModels
from tests.harness import Result, ask, load_base_for_lowering, lower_directory, make_encoder, make_engine, run
from tests.tiny import ENCODERS

LABELS = 3
PROMPTS = {
    "short": [1, 9, 200, 31, 2],
    "same length": [1, 7, 8, 9, 2],
    "long": [1, *((7 * index) % 250 + 5 for index in range(70)), 2],
}
TOLERANCE = 1e-4
CLASSES = {"SEQ_CLS": AutoModelForSequenceClassification, "TOKEN_CLS": AutoModelForTokenClassification}


def lora(**settings: Any) -> Any:
    return lambda task: LoraConfig(task_type=task, r=4, lora_alpha=6, **settings)


@dataclass(frozen=True)
class Case:
    """A PEFT configuration by task; ``kept`` are parameters that get noise on top of what they are."""

    name: str
    config: Any
    families: tuple[str, ...]
    tasks: tuple[str, ...] = ("SEQ_CLS", "TOKEN_CLS")
    kept: tuple[str, ...] = field(default=("modules_to_save",))


CASES = (
    Case("lora", lora(target_modules=["query", "value"]), ("bert", "roberta")),
    Case("lora-pooler", lora(target_modules="all-linear"), ("bert",), ("SEQ_CLS",)),
    Case("saved-pooler", lora(target_modules=["query"], modules_to_save=["pooler"]), ("bert",), ("SEQ_CLS",)),
    Case("dora-bias", lora(target_modules=["query", "lin1", "intermediate.dense"], use_dora=True), ("bert",)),
    Case("lora", lora(target_modules=["q_lin", "lin2"], modules_to_save=["pre_classifier"]), ("distilbert",), ("SEQ_CLS",)),
    Case("lora", lora(target_modules=["q_lin", "lin2"]), ("distilbert",), ("TOKEN_CLS",)),
    Case("ia3", lambda task: IA3Config(task_type=task), ("bert", "roberta"), kept=("modules_to_save", "ia3_l")),
    Case("lora", lora(target_modules=["q_proj", "down_proj"]), ("llama", "qwen2")),
    Case("lora", lora(target_modules=["c_attn"], fan_in_fan_out=True), ("gpt2",)),
    Case("lora", lora(target_modules=["q_proj", "fc1"]), ("opt",), ("SEQ_CLS",)),
    Case("prompt", lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=3), ("bert", "roberta", "llama")),
    Case("prefix", lambda task: PrefixTuningConfig(task_type=task, num_virtual_tokens=3), ("bert", "llama")),
)
PARAMETERS = [
    pytest.param(family, task, case, id=f"{family}-{task}-{case.name}")
    for case in CASES
    for family in case.families
    for task in case.tasks
]


def make_checkpoint(case: Case, task: str, base: Path, directory: Path, *, seed: int = 9) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(CLASSES[task].from_pretrained(base, num_labels=LABELS, dtype=torch.float32), case.config(task))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.data = parameter.data + noise if any(part in name for part in case.kept) else noise
    model.save_pretrained(directory)
    return directory


@torch.inference_mode()
def reference(task: str, base: Path, adapter: Path, prompt: list[int], *, neutral: bool = False) -> torch.Tensor:
    """Logits ``(n, labels)`` as PEFT serves them; ``neutral``: with the same classifier on a backbone without the adapter."""
    model = PeftModel.from_pretrained(CLASSES[task].from_pretrained(base, num_labels=LABELS, dtype=torch.float32), adapter).eval()
    for name, parameter in model.named_parameters():
        if neutral and any(part in name for part in ("lora_B", "ia3_l", "prompt_encoder")):
            parameter.data.fill_(float("ia3_l" in name))
    logits = model(input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long)).logits
    # PEFT shows virtual tokens' rows too; they are nobody's tokens.
    return logits if task == "SEQ_CLS" else logits[0, -len(prompt) :]


def classify(family: str, base: Path, program: ProgramRef) -> dict[str, Result]:
    engine = make_encoder(base) if family in ENCODERS else make_engine(base)
    results = run(engine, [ask(name, prompt, program) for name, prompt in PROMPTS.items()])
    engine.close()
    return results


@pytest.mark.parametrize(("family", "task", "case"), PARAMETERS)
def test_logits_equal_peft(family: str, task: str, case: Case, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models(family)
    adapter = make_checkpoint(case, task, base, tmp_path)
    results = classify(family, base, lower_directory(adapter, load_base_for_lowering(base), f"{family}-{task}-{case.name}"))
    for name, prompt in PROMPTS.items():
        expected = reference(task, base, adapter, prompt)
        found = results[name]
        assert found.result is not None, found.error
        assert found.result.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
        assert found.result.per_token == (task == "TOKEN_CLS")
        assert found.rows.shape == expected.shape
        assert float((found.rows - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max())), name
    first = PROMPTS["short"]
    without = reference(task, base, adapter, first, neutral=True)
    assert float((results["short"].rows - without).abs().max()) > 1e-2, "the adapter changes nothing"
