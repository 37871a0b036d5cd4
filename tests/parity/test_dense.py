"""Methods whose change of a weight is dense, or needs the base's weight: each against PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest

from tests.conftest import TinyModels
from tests.parity.cases import PLAIN_LINEARS, Case, by_family, embedding, linears, two_linears
from tests.parity.equality import check_case


def config(kind: str, targets: Callable[[str], list[str]] = linears, **settings: Any) -> Any:
    """A PEFT config on all linears of a layer, or on other ``targets``; settings may be functions of the family too."""

    def make(family: str) -> Any:
        known = {"fan_in_fan_out": True} if family == "gpt2" and hasattr(getattr(peft, kind), "fan_in_fan_out") else {}
        given = {name: value(family) if callable(value) else value for name, value in settings.items()}
        return getattr(peft, kind)(target_modules=targets(family), task_type="CAUSAL_LM", **known, **given)

    return make


def embedding_and_linear(family: str) -> list[str]:
    return [embedding(family), two_linears(family)[0]]


def first_linear(value: float) -> Callable[[str], dict[str, float]]:
    """A pattern with a value of its own for one linear."""
    return lambda family: {two_linears(family)[0]: value}


CASES = (
    Case("shira", config("ShiraConfig", r=3, init_weights=False, random_seed=5), PLAIN_LINEARS),
    Case("randlora", config("RandLoraConfig", r=5, randlora_alpha=20), scale=0.3),
    Case("randlora-drawn", config("RandLoraConfig", r=8, randlora_alpha=20, save_projection=False), scale=0.3),
    Case(
        "randlora-sparse",
        config("RandLoraConfig", r=8, randlora_alpha=20, save_projection=False, sparse=True),
        PLAIN_LINEARS,
        scale=0.3,
    ),
    Case("randlora-very-sparse", config("RandLoraConfig", r=8, save_projection=False, very_sparse=True), PLAIN_LINEARS),
    Case("fourierft", config("FourierFTConfig", n_frequency=200, scaling=150.0), scale=1.0),
    Case(
        "fourierft-pattern",
        config("FourierFTConfig", n_frequency=100, n_frequency_pattern={"k_proj": 60, "c_proj": 50, "key": 60}),
        scale=1.0,
    ),
    Case(
        "waveft", config("WaveFTConfig", n_frequency=150, n_frequency_pattern={"k_proj": 60, "c_proj": 50, "key": 60}), scale=0.05
    ),
    Case("waveft-direct", config("WaveFTConfig", n_frequency=150, use_idwt=False, random_loc_seed=3), scale=0.02),
    Case("waveft-proportional", config("WaveFTConfig", n_frequency=150, proportional_parameters=True), PLAIN_LINEARS, scale=0.05),
    Case(
        "c3a",
        config("C3AConfig", block_size=8, block_size_pattern={"k_proj": 16, "key": 16}, init_weights="gaussian"),
        PLAIN_LINEARS,
        scale=1.0,
    ),
    Case("osf", config("OSFConfig", effective_rank=26), PLAIN_LINEARS, kept=("osf",)),
    Case("osf-dense", config("OSFConfig", effective_rank=4, rank_pattern=first_linear(0.5)), PLAIN_LINEARS, kept=("osf",)),
    Case("hira", config("HiraConfig", r=4), scale=0.4),
    Case(
        "hira-embedding",
        config("HiraConfig", embedding_and_linear, r=4, rank_pattern=first_linear(2)),
        PLAIN_LINEARS,
        scale=0.4,
    ),
    Case("glora", config("GloraConfig", r=3, config_D_E="vector"), PLAIN_LINEARS),
    Case(
        "glora-vector", config("GloraConfig", config_A_B="vector", config_C="vector", bias="all"), PLAIN_LINEARS, kept=(".bias",)
    ),
    Case(
        "glora-constant",
        config("GloraConfig", config_A_B="constant", config_C="none", config_D_E="none"),
        PLAIN_LINEARS,
        scale=0.1,
    ),
    Case("peanut", config("PeanutConfig", r=4), PLAIN_LINEARS, scale=0.3),
    Case("peanut-deep", config("PeanutConfig", r=4, depth=2, act_fn="silu", scaling=0.7), PLAIN_LINEARS, scale=0.5),
    Case("deft", config("DeftConfig", r=4, alpha=6)),
    Case("deft-qr", config("DeftConfig", r=4, decomposition_method="qr")),
    Case("deft-para", config("DeftConfig", r=2, para=True, decomposition_method="qr")),
    Case("frod", config("FrodConfig", sparse_rate=0.05, progressbar=False), kept=("lambda_l",)),
)


@pytest.mark.parametrize(("family", "case"), by_family(CASES))
def test_equals_peft(family: str, case: Case, tiny_models: TinyModels, tmp_path: Path) -> None:
    check_case(case, family, tiny_models(family), tmp_path)
