"""Methods that come down to low rank equal PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import (
    DeloraConfig,
    GraloraConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    PveraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)

from tests.conftest import TinyModels
from tests.parity.cases import DEFAULT_LINEARS, Case, check_case, linears

# PEFT warns of what it decides by itself: projections that are drawn again, weights that are stored transposed.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

# PEFT has no layers of these methods for GPT-2's Conv1D.
PLAIN_LINEARS = ("llama", "qwen2")
# Variants of a method that other cases show to fit every family.
ONE_IS_ENOUGH = ("llama",)
WITH_BIASES = ("gpt2", "qwen2")
COMMON = {"task_type": "CAUSAL_LM"}
LORA_LIKE = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}, "alpha_pattern": {"o_proj": 3}}


def some(family: str) -> list[str]:
    """Two linears of different shapes."""
    return ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]


CASES = (
    Case(
        "vera",
        lambda family: VeraConfig(r=8, target_modules=linears(family), bias="all", **COMMON),
        trained=("vera_lambda",),
        kept=(".bias",),
        scale=0.4,
    ),
    Case(
        "vera-drawn",
        lambda family: VeraConfig(
            r=8, target_modules=some(family), save_projection=False, projection_prng_key=11, layers_to_transform=[1], **COMMON
        ),
        scale=1.0,
    ),
    Case("pvera", lambda family: PveraConfig(r=8, target_modules=linears(family), **COMMON), scale=0.4),
    Case(
        "pvera-drawn",
        lambda family: PveraConfig(r=8, target_modules=some(family), save_projection=False, projection_prng_key=5, **COMMON),
        ONE_IS_ENOUGH,
        scale=0.8,
    ),
    Case(
        "loha",
        lambda _: LoHaConfig(r=3, alpha=9, target_modules=DEFAULT_LINEARS, **LORA_LIKE, **COMMON),
        PLAIN_LINEARS,
        scale=0.4,
    ),
    # 8² ranks are more than these linears have: the dense difference is smaller.
    Case(
        "loha-dense",
        lambda _: LoHaConfig(r=8, alpha=8, target_modules=["q_proj", "down_proj"], **COMMON),
        ONE_IS_ENOUGH,
        scale=0.2,
    ),
    Case(
        "lokr",
        lambda _: LoKrConfig(r=16, alpha=8, target_modules=DEFAULT_LINEARS, **LORA_LIKE, **COMMON),
        PLAIN_LINEARS,
        trained=("lokr_",),
        scale=0.3,
    ),
    Case(
        "lokr-factors",
        lambda _: LoKrConfig(r=1, alpha=2, target_modules=DEFAULT_LINEARS, decompose_both=True, decompose_factor=4, **COMMON),
        ONE_IS_ENOUGH,
        scale=0.6,
    ),
    Case(
        "lokr-low-rank",
        lambda _: LoKrConfig(r=1, alpha=1, target_modules=["q_proj"], decompose_factor=1, **COMMON),
        ONE_IS_ENOUGH,
        scale=0.4,
    ),
    Case(
        "hra", lambda _: HRAConfig(r=5, target_modules=DEFAULT_LINEARS, bias="hra_only", **COMMON), PLAIN_LINEARS, kept=(".bias",)
    ),
    Case("hra-head", lambda _: HRAConfig(r=3, target_modules=["lm_head", "q_proj"], **COMMON), PLAIN_LINEARS),
    Case(
        "hra-orthonormal",
        lambda _: HRAConfig(r=4, target_modules=["v_proj", "down_proj"], apply_GS=True, **COMMON),
        ONE_IS_ENOUGH,
    ),
    # 5 does not divide the widths: the last block of inputs is a short one.
    Case("miss", lambda _: MissConfig(r=5, target_modules=DEFAULT_LINEARS, **COMMON), PLAIN_LINEARS),
    Case(
        "miss-mini",
        lambda _: MissConfig(r=4, mini_r=8, init_weights="mini", target_modules=DEFAULT_LINEARS, **COMMON),
        ONE_IS_ENOUGH,
    ),
    Case("miss-bat", lambda _: MissConfig(r=4, init_weights="bat", target_modules=DEFAULT_LINEARS, **COMMON), PLAIN_LINEARS),
    Case(
        "vblora",
        lambda family: VBLoRAConfig(
            r=4, num_vectors=20, vector_length=8, topk=3, target_modules=linears(family), bias="vblora_only", **COMMON
        ),
        kept=(".bias",),
        scale=0.4,
    ),
    Case(
        "vblora-short",
        lambda family: VBLoRAConfig(
            r=4, num_vectors=20, vector_length=8, topk=2, target_modules=some(family), save_only_topk_weights=True, **COMMON
        ),
        scale=0.6,
    ),
    Case(
        "delora",
        lambda _: DeloraConfig(r=4, target_modules=DEFAULT_LINEARS, rank_pattern={"q_proj": 2}, **COMMON),
        PLAIN_LINEARS,
        kept=("delora_lambda",),
    ),
    Case(
        "gralora", lambda family: GraloraConfig(r=8, gralora_k=4, alpha=12, target_modules=linears(family), **COMMON), scale=0.2
    ),
    Case(
        "gralora-hybrid",
        lambda family: GraloraConfig(r=6, gralora_k=2, hybrid_r=3, alpha=9, target_modules=some(family), **COMMON),
        scale=0.3,
    ),
    Case(
        "tinylora",
        lambda family: TinyLoraConfig(r=3, u=5, target_modules=linears(family), **COMMON),
        trained=("tinylora_v",),
        scale=0.4,
    ),
    Case(
        "tinylora-drawn",
        lambda family: TinyLoraConfig(
            r=3, u=5, weight_tying=0.6, save_projection=False, projection_seed=7, target_modules=linears(family), **COMMON
        ),
        trained=("tinylora_v",),
        scale=0.4,
    ),
    Case(
        "tinylora-embedding",
        lambda family: TinyLoraConfig(
            r=3,
            u=4,
            weight_tying=1.0,
            projection_seed=7,
            target_modules=[*some(family), "wte" if family == "gpt2" else "embed_tokens"],
            **COMMON,
        ),
        trained=("tinylora_v",),
        scale=0.4,
    ),
    Case(
        "unilora",
        lambda family: UniLoraConfig(r=4, theta_d_length=100, target_modules=linears(family), save_indices=True, **COMMON),
        scale=2.0,
    ),
    Case(
        "unilora-drawn",
        lambda family: UniLoraConfig(
            r=4, theta_d_length=70, proj_seed=3, target_modules=some(family), layers_to_transform=[1], **COMMON
        ),
        scale=2.0,
    ),
)


@pytest.mark.parametrize(
    ("family", "case"), [pytest.param(family, case, id=f"{family}-{case.name}") for case in CASES for family in case.families]
)
def test_equals_peft(family: str, case: Case, tiny_models: TinyModels, tmp_path: Path) -> None:
    check_case(case, family, tiny_models(family), tmp_path)
