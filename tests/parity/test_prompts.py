"""Virtual tokens and prefixes equal PEFT: forward passes, and its own cached generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)

from tests.conftest import TinyModels
from tests.harness import greedy, load_base_for_lowering, lower_directory, make_engine, run
from tests.parity.cases import PROMPTS, Case, check_case, make_checkpoint
from tests.parity.variants import load_reference

FAMILIES = ("llama", "gpt2", "qwen2", "opt")


def config(kind: Callable[..., Any], tokens: int, **settings: Any) -> Callable[[str], Any]:
    return lambda _: kind(task_type="CAUSAL_LM", num_virtual_tokens=tokens, **settings)


def cpt(_: str) -> CPTConfig:
    return CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=list(range(30, 49)), cpt_mask=[1] * 19, cpt_tokens_type_mask=[1] * 19)


def adaption(tokens: int, layers: int) -> Callable[[str], Any]:
    return lambda _: AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=tokens, adapter_layers=layers)


CASES = (
    Case("prompt-5", config(PromptTuningConfig, 5), (*FAMILIES, "mistral", "gemma2"), scale=0.5),
    Case("prompt-1", config(PromptTuningConfig, 1), ("llama", "gpt2"), scale=0.5),
    Case("prompt-20", config(PromptTuningConfig, 20), (*FAMILIES, "mistral", "gemma2"), scale=0.5),
    Case("p-tuning-mlp", config(PromptEncoderConfig, 5, encoder_hidden_size=24), ("llama", "gpt2", "qwen2"), scale=0.6),
    Case(
        "p-tuning-lstm",
        config(PromptEncoderConfig, 20, encoder_reparameterization_type="LSTM", encoder_hidden_size=24),
        ("llama",),
        scale=0.6,
    ),
    Case("cpt-19", cpt, ("llama", "gpt2", "qwen2")),
    Case(
        "multitask-5",
        config(MultitaskPromptTuningConfig, 5, num_ranks=2),
        ("llama", "gpt2", "qwen2"),
        scale=0.8,
        arguments={"task_ids": torch.tensor([0])},
    ),
    Case("prefix-5", config(PrefixTuningConfig, 5), (*FAMILIES, "mistral", "gemma2"), scale=1.0),
    Case("prefix-1", config(PrefixTuningConfig, 1), ("llama", "gpt2"), scale=1.0),
    Case("prefix-20", config(PrefixTuningConfig, 20), (*FAMILIES, "mistral", "gemma2"), scale=1.0),
    Case(
        "prefix-projected", config(PrefixTuningConfig, 5, prefix_projection=True, encoder_hidden_size=24), ("llama",), scale=0.6
    ),
    Case("adaption-5", adaption(5, 2), ("llama", "mistral", "gpt2"), scale=0.8),
    Case("adaption-20", adaption(20, 1), ("llama", "mistral", "gpt2"), scale=0.8),
    Case("cartridge-17", config(CartridgeConfig, 17), ("llama", "gpt2", "qwen2"), scale=1.0),
)


@pytest.mark.parametrize(
    ("family", "case"), [pytest.param(family, case, id=f"{family}-{case.name}") for case in CASES for family in case.families]
)
def test_equals_peft(family: str, case: Case, tiny_models: TinyModels, tmp_path: Path) -> None:
    check_case(case, family, tiny_models(family), tmp_path)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("family", [*FAMILIES, "mistral", "gemma2"])
@pytest.mark.parametrize("name", ["prompt-20", "prefix-20"])
def test_tokens_equal_cached_generation(family: str, name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    """PEFT puts prefixes into generation's cache by another way than into a forward pass; what its users see is generation."""
    base = tiny_models(family)
    case = next(case for case in CASES if case.name == name)
    adapter = make_checkpoint(case, family, base, tmp_path)
    program = lower_directory(adapter, load_base_for_lowering(base), name)
    engine = make_engine(base)
    prompts = {length: list(PROMPTS["long"])[:length] for length in (1, 7, 33)}
    results = run(engine, [greedy(str(length), prompt, program, tokens=24) for length, prompt in prompts.items()])
    engine.close()
    reference = load_reference(base, adapter)
    reference.base_model.generation_config.eos_token_id = None
    for length, prompt in prompts.items():
        ids = torch.tensor([prompt])
        expected = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert results[str(length)].tokens == expected[0, length:].tolist()
