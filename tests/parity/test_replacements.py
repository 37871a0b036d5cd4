"""Methods that replace or add to single parameters equal PEFT: norms, rows of the vocabulary, biases, single weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import BeftConfig, LNTuningConfig, LoHaConfig, SupertuningConfig, TrainableTokensConfig

from tests.conftest import TinyModels
from tests.parity.cases import FAMILIES, ONE_IS_ENOUGH, PLAIN_LINEARS, Case, by_family, embedding, linears, norms, two_linears
from tests.parity.equality import check_case

# PEFT warns of what it decides by itself, and of norms as targets.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

COMMON = {"task_type": "CAUSAL_LM"}

CASES = (
    Case(
        "ln-tuning",
        lambda family: LNTuningConfig(target_modules=norms(family), **COMMON),
        kept=("ln_tuning_layers",),
    ),
    # Qwen2 and GPT-2 have the embedding as their head, too.
    Case(
        "trainable-tokens",
        lambda family: TrainableTokensConfig(token_indices=[200, 9, 45, 7], target_modules=[embedding(family)], **COMMON),
        FAMILIES,
        scale=1.0,
    ),
    Case("beft", lambda family: BeftConfig(target_modules=two_linears(family), **COMMON), PLAIN_LINEARS, scale=0.4),
    Case("supertuning", lambda family: SupertuningConfig(target_modules=linears(family), sparsity=0.9, **COMMON), PLAIN_LINEARS),
    Case(
        "supertuning-low-rank",
        lambda family: SupertuningConfig(
            target_modules=linears(family), sparsity=0.9, r=3, lora_alpha=5, select_top=False, **COMMON
        ),
        ONE_IS_ENOUGH,
    ),
    # Modules of any kind that are saved whole, beside a method's own tensors.
    Case(
        "saved-modules",
        lambda _: LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "input_layernorm", "o_proj"], **COMMON),
        ("llama",),
        kept=("modules_to_save",),
    ),
)

# A family's own: norms of each head, in front of attention.
QWEN3 = Case(
    "ln-tuning-heads",
    lambda _: LNTuningConfig(target_modules=["q_norm", "k_norm"], **COMMON),
    ("qwen3",),
    kept=("ln_tuning_layers",),
    scale=0.5,
)


@pytest.mark.parametrize(("family", "case"), by_family((*CASES, QWEN3)))
def test_equals_peft(family: str, case: Case, tiny_models: TinyModels, tmp_path: Path) -> None:
    check_case(case, family, tiny_models(family), tmp_path)
