"""Classifiers trained with PEFT equal PEFT, on decoders and encoders: logits of sentences and of tokens, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig

from tests.conftest import TinyModels
from tests.parity.cases import Case
from tests.parity.equality import check_classifier

BOTH = ("SEQ_CLS", "TOKEN_CLS")
SENTENCES = ("SEQ_CLS",)
TOKENS = ("TOKEN_CLS",)


def lora(name: str, targets: list[str] | str, families: tuple[str, ...], **settings: object) -> Case:
    return Case(
        name,
        lambda family: LoraConfig(r=4, lora_alpha=6, target_modules=targets, fan_in_fan_out=family == "gpt2", **settings),
        families,
    )


CLASSIFIERS = (
    (BOTH, lora("lora", ["query", "value"], ("bert", "roberta"))),
    (SENTENCES, lora("lora-pooler", "all-linear", ("bert",))),
    # With the pooler's bias; once where LoRA is on the pooler too.
    (BOTH, lora("all-biases", ["query", "value"], ("bert", "roberta"), bias="all")),
    (SENTENCES, lora("all-biases-pooler", "all-linear", ("bert",), bias="all")),
    (SENTENCES, lora("saved-pooler", ["query"], ("bert",), modules_to_save=["pooler"])),
    (BOTH, lora("dora-bias", ["query", "lin1", "intermediate.dense"], ("bert",), use_dora=True)),
    (SENTENCES, lora("lora", ["q_lin", "lin2"], ("distilbert",), modules_to_save=["pre_classifier"])),
    (TOKENS, lora("lora", ["q_lin", "lin2"], ("distilbert",))),
    (BOTH, Case("ia3", lambda _: IA3Config(), ("bert", "roberta"), kept=("ia3_l",))),
    (BOTH, lora("lora", ["q_proj", "down_proj"], ("llama", "qwen2"))),
    (BOTH, lora("lora", ["c_attn"], ("gpt2",))),
    (SENTENCES, lora("lora", ["q_proj", "fc1"], ("opt",))),
    (BOTH, Case("prompt", lambda _: PromptTuningConfig(num_virtual_tokens=3), ("bert", "roberta", "llama"))),
    (BOTH, Case("prefix", lambda _: PrefixTuningConfig(num_virtual_tokens=3), ("bert", "llama"))),
)


@pytest.mark.parametrize(
    ("family", "task", "case"),
    [
        pytest.param(family, task, case, id=f"{family}-{task}-{case.name}")
        for tasks, case in CLASSIFIERS
        for family in case.families
        for task in tasks
    ],
)
def test_logits_equal_peft(family: str, task: str, case: Case, tiny_models: TinyModels, tmp_path: Path) -> None:
    check_classifier(case, family, task, tiny_models(family), tmp_path)
