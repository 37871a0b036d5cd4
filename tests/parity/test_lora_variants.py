"""Variants of LoRA that one config field switches on: each against PEFT; and combinations that nothing defines are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import AdaLoraConfig, LoraConfig
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file

from server.adapters.faults import LoweringError
from server.adapters.lower import Checkpoint, lower
from tests.conftest import TinyModels
from tests.harness import load_base_for_lowering
from tests.parity.cases import ONE_IS_ENOUGH, PLAIN_LINEARS, Case, by_family, linears, make_checkpoint
from tests.parity.equality import check_case


def config(**settings: Any) -> Any:
    def make(family: str) -> Any:
        return LoraConfig(
            r=4, lora_alpha=6, target_modules=linears(family), fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM", **settings
        )

    return make


BLOCKS = BdLoraConfig(
    target_modules_bd_a=["o_proj", "down_proj", "output.dense"],
    target_modules_bd_b=["q_proj", "up_proj", "query"],
    nblocks=2,
    match_strict=False,
)
CASES = (
    Case("bdlora", config(use_bdlora=BLOCKS), PLAIN_LINEARS, trained=("lora_",)),
    Case("kasa", config(kasa_config=KasaConfig()), PLAIN_LINEARS),
    Case("velora", config(velora_config=VeloraConfig(num_groups=4))),
    Case("monteclora", config(monteclora_config=MontecloraConfig()), PLAIN_LINEARS),
    Case("dora-pissa", config(use_dora=True, init_lora_weights="pissa"), kept=("magnitude",)),
    Case("dora-olora", config(use_dora=True, init_lora_weights="olora"), PLAIN_LINEARS, kept=("magnitude",)),
    # As test_lora has it on every family of decoders.
    Case(
        "adalora",
        lambda family: AdaLoraConfig(
            init_r=4, target_r=3, total_step=10, lora_alpha=6, target_modules=linears(family), task_type="CAUSAL_LM"
        ),
        (*ONE_IS_ENOUGH, "bert"),
        scale=0.4,
    ),
)


@pytest.mark.parametrize(("family", "case"), by_family(CASES))
def test_equals_peft(family: str, case: Case, tiny_models: TinyModels, tmp_path: Path) -> None:
    check_case(case, family, tiny_models(family), tmp_path)


@pytest.mark.parametrize(
    ("index", "changed", "code"),
    [
        (0, {"use_bdlora": {"nblocks": 3}}, "wrong_shape"),
        (0, {"use_bdlora": {"nblocks": 0}}, "unsupported_field"),
        (0, {"use_bdlora": True}, "unsupported_field"),
        (0, {"kasa_config": {"beta": 1e-4}}, "unsupported_field"),
        (1, {"kasa_config": None}, "unused_tensor"),
        (1, {"init_lora_weights": "pissa"}, "unsupported_field"),
        (1, {"use_dora": True}, "unsupported_field"),
        (2, {"kasa_config": {}, "velora_config": None}, "unused_tensor"),
        (2, {"kasa_config": {"beta": 1e-4}, "velora_config": None}, "missing_tensor"),
        (3, {"monteclora_config": {"unknown": 1}}, "unsupported_field"),
    ],
)
def test_faults(index: int, changed: dict[str, Any], code: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    adapter = make_checkpoint(CASES[index], "llama", base, tmp_path)
    settings = LoraConfig.from_pretrained(adapter).to_dict() | {"peft_type": "LORA", "task_type": "CAUSAL_LM"}
    settings["target_modules"] = None
    with pytest.raises(LoweringError) as caught:
        lower(Checkpoint(settings | changed, load_file(adapter / "adapter_model.safetensors")), load_base_for_lowering(base))
    assert code in {fault.code for fault in caught.value.faults}
