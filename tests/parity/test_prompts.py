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
from tests.harness import greedy, lower_directory
from tests.parity.cases import FAMILIES, ONE_IS_ENOUGH, Case, by_family, make_checkpoint
from tests.parity.equality import PROMPTS, check_case, load_reference
from tests.parity.shared import lowering_base, serve

DECODERS = (*FAMILIES, "opt", "mistral", "gemma2")
WITH_ENCODER = (*DECODERS, "bert")


def config(kind: Callable[..., Any], tokens: int, **settings: Any) -> Callable[[str], Any]:
    return lambda _: kind(task_type="CAUSAL_LM", num_virtual_tokens=tokens, **settings)


def cpt(_: str) -> CPTConfig:
    return CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=list(range(30, 49)), cpt_mask=[1] * 19, cpt_tokens_type_mask=[1] * 19)


def adaption(tokens: int, layers: int) -> Callable[[str], Any]:
    return lambda _: AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=tokens, adapter_layers=layers)


CASES = (
    Case("prompt-5", config(PromptTuningConfig, 5), WITH_ENCODER, scale=0.5),
    Case("prompt-1", config(PromptTuningConfig, 1), ("llama", "gpt2"), scale=0.5),
    Case("prompt-20", config(PromptTuningConfig, 20), DECODERS, scale=0.5),
    Case("p-tuning-mlp", config(PromptEncoderConfig, 5, encoder_hidden_size=24), scale=0.6),
    Case(
        "p-tuning-lstm",
        config(PromptEncoderConfig, 20, encoder_reparameterization_type="LSTM", encoder_hidden_size=24),
        ONE_IS_ENOUGH,
        scale=0.6,
    ),
    Case("cpt-19", cpt, FAMILIES),
    Case(
        "multitask-5",
        config(MultitaskPromptTuningConfig, 5, num_ranks=2),
        scale=0.8,
        arguments={"task_ids": torch.tensor([0])},
    ),
    Case("prefix-5", config(PrefixTuningConfig, 5), WITH_ENCODER, scale=1.0),
    Case("prefix-1", config(PrefixTuningConfig, 1), ("llama", "gpt2"), scale=1.0),
    Case("prefix-20", config(PrefixTuningConfig, 20), DECODERS, scale=1.0),
    Case(
        "prefix-projected",
        config(PrefixTuningConfig, 5, prefix_projection=True, encoder_hidden_size=24),
        ONE_IS_ENOUGH,
        scale=0.6,
    ),
    Case("adaption-5", adaption(5, 2), ("llama", "mistral", "gpt2"), scale=0.8),
    Case("adaption-20", adaption(20, 1), ("llama", "mistral", "gpt2"), scale=0.8),
    Case("cartridge-17", config(CartridgeConfig, 17), scale=1.0),
)


@pytest.mark.parametrize(("family", "case"), by_family(CASES))
def test_equals_peft(family: str, case: Case, tiny_models: TinyModels, tmp_path: Path) -> None:
    check_case(case, family, tiny_models(family), tmp_path)


@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("name", ["prompt-20", "prefix-20"])
def test_tokens_equal_cached_generation(family: str, name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    """PEFT puts prefixes into generation's cache by another way than into a forward pass; what its users see is generation."""
    base = tiny_models(family)
    case = next(case for case in CASES if case.name == name)
    adapter = make_checkpoint(case, family, base, tmp_path)
    program = lower_directory(adapter, lowering_base(base), f"generation-{name}")
    prompts = {length: list(PROMPTS["long"])[:length] for length in (1, 7, 33)}
    results = serve(base, program, [greedy(str(length), prompt, program, tokens=24) for length, prompt in prompts.items()])
    reference = load_reference(base, adapter)
    reference.base_model.generation_config.eos_token_id = None
    for length, prompt in prompts.items():
        ids = torch.tensor([prompt])
        expected = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        assert results[str(length)].tokens == expected[0, length:].tolist()
