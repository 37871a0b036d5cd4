"""Methods that come down to low rank equal PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import (
    DeloraConfig,
    GraloraConfig,
    HRAConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    PolyConfig,
    PveraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)

from tests.conftest import TinyModels
from tests.parity.cases import FAMILIES, ONE_IS_ENOUGH, PLAIN_LINEARS, Case, by_family, embedding, linears, two_linears
from tests.parity.equality import check_case

# PEFT warns of what it decides by itself: projections that are drawn again, weights that are stored transposed.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

COMMON = {"task_type": "CAUSAL_LM"}


def patterns(family: str) -> dict[str, dict[str, int]]:
    """Of a module's name and of a path."""
    if family == "bert":
        return {"rank_pattern": {"query": 2, "layer.1.intermediate.dense": 3}, "alpha_pattern": {"value": 3}}
    return {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 3}, "alpha_pattern": {"o_proj": 3}}


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
            r=8,
            target_modules=two_linears(family),
            save_projection=False,
            projection_prng_key=11,
            layers_to_transform=[1],
            **COMMON,
        ),
        scale=1.0,
    ),
    Case("pvera", lambda family: PveraConfig(r=8, target_modules=linears(family), **COMMON), scale=0.4),
    Case(
        "pvera-drawn",
        lambda family: PveraConfig(
            r=8, target_modules=two_linears(family), save_projection=False, projection_prng_key=5, **COMMON
        ),
        ONE_IS_ENOUGH,
        scale=0.8,
    ),
    Case(
        "loha",
        lambda family: LoHaConfig(r=3, alpha=9, target_modules=linears(family), **patterns(family), **COMMON),
        PLAIN_LINEARS,
        scale=0.4,
    ),
    # 8² ranks are more than these linears have: the dense difference is smaller.
    Case(
        "loha-dense",
        lambda family: LoHaConfig(r=8, alpha=8, target_modules=two_linears(family), **COMMON),
        ONE_IS_ENOUGH,
        scale=0.2,
    ),
    Case(
        "lokr",
        lambda family: LoKrConfig(r=16, alpha=8, target_modules=linears(family), **patterns(family), **COMMON),
        PLAIN_LINEARS,
        trained=("lokr_",),
        scale=0.3,
    ),
    Case(
        "lokr-factors",
        lambda family: LoKrConfig(
            r=1, alpha=2, target_modules=linears(family), decompose_both=True, decompose_factor=4, **COMMON
        ),
        ONE_IS_ENOUGH,
        scale=0.6,
    ),
    Case(
        "lokr-low-rank",
        lambda family: LoKrConfig(r=1, alpha=1, target_modules=["q_proj"], decompose_factor=1, **COMMON),
        ONE_IS_ENOUGH,
        scale=0.4,
    ),
    Case(
        "hra",
        lambda family: HRAConfig(r=5, target_modules=linears(family), bias="hra_only", **COMMON),
        PLAIN_LINEARS,
        kept=(".bias",),
    ),
    Case("hra-head", lambda _: HRAConfig(r=3, target_modules=["lm_head", "q_proj"], **COMMON), FAMILIES),
    Case(
        "hra-orthonormal",
        lambda family: HRAConfig(r=4, target_modules=["v_proj", "down_proj"], apply_GS=True, **COMMON),
        ONE_IS_ENOUGH,
    ),
    # 5 does not divide the widths: the last block of inputs is a short one.
    Case("miss", lambda family: MissConfig(r=5, target_modules=linears(family), **COMMON), PLAIN_LINEARS),
    Case(
        "miss-mini",
        lambda family: MissConfig(r=4, mini_r=8, init_weights="mini", target_modules=linears(family), **COMMON),
        ONE_IS_ENOUGH,
    ),
    Case("miss-bat", lambda family: MissConfig(r=4, init_weights="bat", target_modules=linears(family), **COMMON), PLAIN_LINEARS),
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
            r=4,
            num_vectors=20,
            vector_length=8,
            topk=2,
            target_modules=two_linears(family),
            save_only_topk_weights=True,
            **COMMON,
        ),
        scale=0.6,
    ),
    Case(
        "delora",
        lambda family: DeloraConfig(r=4, target_modules=linears(family), rank_pattern={two_linears(family)[0]: 2}, **COMMON),
        PLAIN_LINEARS,
        kept=("delora_lambda",),
    ),
    Case(
        "gralora", lambda family: GraloraConfig(r=8, gralora_k=4, alpha=12, target_modules=linears(family), **COMMON), scale=0.2
    ),
    Case(
        "gralora-hybrid",
        lambda family: GraloraConfig(r=6, gralora_k=2, hybrid_r=3, alpha=9, target_modules=two_linears(family), **COMMON),
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
            target_modules=[*two_linears(family), embedding(family)],
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
            r=4, theta_d_length=70, proj_seed=3, target_modules=two_linears(family), layers_to_transform=[1], **COMMON
        ),
        scale=2.0,
    ),
    *(
        Case(
            f"poly-{splits}",
            lambda family, splits=splits: PolyConfig(
                r=3, n_skills=3, n_splits=splits, n_tasks=1, target_modules=linears(family), **COMMON
            ),
            PLAIN_LINEARS,
            scale=0.5,
            arguments={"task_ids": torch.tensor([0])},
        )
        for splits in (1, 4)
    ),
)


@pytest.mark.parametrize(("family", "case"), by_family(CASES))
def test_equals_peft(family: str, case: Case, tiny_models: TinyModels, tmp_path: Path) -> None:
    check_case(case, family, tiny_models(family), tmp_path)
