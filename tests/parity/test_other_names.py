"""Checkpoints that today's PEFT cannot load any more, compared with what it computes for the same tensors under their later name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import MissConfig
from safetensors.torch import load_file, save_file

from tests.conftest import TinyModels
from tests.harness import lower_directory
from tests.parity.cases import DEFAULT_LINEARS, Case, make_checkpoint
from tests.parity.equality import check_equals_peft
from tests.parity.shared import lowering_base


@pytest.mark.parametrize("variant", [True, "bat"])
def test_bone_equals_its_later_name(variant: bool | str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    config = MissConfig(r=4, target_modules=DEFAULT_LINEARS, init_weights=variant, task_type="CAUSAL_LM")
    later = make_checkpoint(Case("miss", lambda _: config, ("llama",)), "llama", base, tmp_path / "miss")
    former = tmp_path / "bone"
    former.mkdir()
    settings = json.loads((later / "adapter_config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in ("mini_r", "miss_dropout")} | {"peft_type": "BONE"}
    (former / "adapter_config.json").write_text(json.dumps(settings))
    tensors = load_file(later / "adapter_model.safetensors")
    save_file(
        {key.replace("miss_block", "bone_block"): value for key, value in tensors.items()}, former / "adapter_model.safetensors"
    )
    check_equals_peft(base, later, lower_directory(former, lowering_base(base), f"bone-{variant}"))
