"""Methods that rotate inputs or pairs of outputs equal PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import BOFTConfig, OFTConfig, RoadConfig
from peft.tuners.boft import layer as boft_layer
from torch import Tensor

from tests.conftest import TinyModels
from tests.parity.cases import FAMILIES, ONE_IS_ENOUGH, PLAIN_LINEARS, Case, by_family, linears, two_linears
from tests.parity.equality import check_case

# PEFT warns of what it decides by itself: projections that are drawn again, weights that are stored transposed.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

COMMON = {"task_type": "CAUSAL_LM"}

CASES = (
    Case(
        "oft",
        lambda family: OFTConfig(oft_block_size=8, target_modules=linears(family), bias="oft_only", **COMMON),
        PLAIN_LINEARS,
        kept=(".bias",),
    ),
    Case(
        "oft-shared",
        lambda family: OFTConfig(
            oft_block_size=4, block_share=True, num_cayley_neumann_terms=3, target_modules=linears(family), **COMMON
        ),
        ONE_IS_ENOUGH,
    ),
    Case(
        "oft-exact",
        lambda family: OFTConfig(oft_block_size=16, use_cayley_neumann=False, target_modules=linears(family), **COMMON),
        ONE_IS_ENOUGH,
    ),
    Case(
        "oft-constrained",
        lambda family: OFTConfig(oft_block_size=0, r=2, coft=True, eps=0.2, target_modules=two_linears(family), **COMMON),
        ONE_IS_ENOUGH,
    ),
    Case(
        "boft",
        lambda family: BOFTConfig(
            boft_block_size=8, boft_n_butterfly_factor=1, target_modules=linears(family), bias="boft_only", **COMMON
        ),
        PLAIN_LINEARS,
        kept=("boft_s", ".bias"),
    ),
    Case(
        "road-head",
        lambda _: RoadConfig(group_size=32, target_modules=["lm_head", "q_proj"], **COMMON),
        FAMILIES,
        kept=("road_alpha",),
    ),
    Case("oft-head", lambda _: OFTConfig(oft_block_size=8, target_modules=["lm_head", "q_proj"], **COMMON), FAMILIES),
    *(
        Case(
            variant,
            lambda family, variant=variant: RoadConfig(variant=variant, group_size=8, target_modules=linears(family), **COMMON),
            PLAIN_LINEARS,
            kept=("road_alpha",),
        )
        for variant in ("road_1", "road_2", "road_4")
    ),
)


@pytest.mark.parametrize(("family", "case"), by_family(CASES))
def test_equals_peft(family: str, case: Case, tiny_models: TinyModels, tmp_path: Path) -> None:
    check_case(case, family, tiny_models(family), tmp_path)


class _BlockDiagonal:
    """What PEFT's extension for CUDA computes: ``(N, blocks, b, b)`` → ``(N, blocks * b, blocks * b)``."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


@pytest.mark.parametrize(("family", "factors"), [("llama", 3), ("qwen2", 2), ("bert", 2)])
def test_butterfly_factors_equal_peft(
    family: str, factors: int, tiny_models: TinyModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: _BlockDiagonal)
    monkeypatch.setattr(boft_layer, "FastBlockDiag", _BlockDiagonal)
    # Widths of 32 and 48 in 8 and 12 blocks of 4.
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=factors, target_modules=linears(family), **COMMON)
    case = Case(f"boft-{factors}", lambda family: config, kept=("boft_s",), scale=0.3)
    check_case(case, family, tiny_models(family), tmp_path)
