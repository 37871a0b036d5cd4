"""Checkpoints that PEFT cannot load, or not without more than a prompt, compared with what it computes for the same tensors."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import MissConfig, PolyConfig
from safetensors.torch import load_file, save_file

from tests.conftest import TinyModels
from tests.harness import greedy, load_base_for_lowering, lower_directory, make_engine, run
from tests.parity.cases import DEFAULT_LINEARS, PROMPTS, Case, check_equals_peft, check_result, make_checkpoint
from tests.parity.variants import load_reference


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
    check_equals_peft(base, later, lower_directory(former, load_base_for_lowering(base), f"bone-{variant}"))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("splits", [1, 4])
def test_poly_of_one_task(family: str, splits: int, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models(family)
    config = PolyConfig(r=3, n_skills=3, n_splits=splits, n_tasks=1, target_modules=DEFAULT_LINEARS, task_type="CAUSAL_LM")
    adapter = make_checkpoint(Case("poly", lambda _: config, scale=0.5), family, base, tmp_path)
    program = lower_directory(adapter, load_base_for_lowering(base), f"poly-{family}-{splits}")
    engine = make_engine(base)
    results = run(engine, [greedy(name, prompt, program) for name, prompt in PROMPTS.items()])
    plain = run(engine, [greedy("plain", PROMPTS["short"])])["plain"]
    engine.close()
    reference = partial(load_reference(base, adapter), task_ids=torch.tensor([0]))
    for name, prompt in PROMPTS.items():
        check_result(results[name], reference, prompt, name)
    assert float((plain.logits[0] - results["short"].logits[0]).abs().max()) > 1e-2
