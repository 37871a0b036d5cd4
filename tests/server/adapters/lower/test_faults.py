"""Refusals of the lowering: hostile configs and tensors raise LoweringError, and nothing else."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from server.adapters.faults import LoweringError
from server.adapters.lower import REFUSED, Checkpoint, lower, methods
from server.adapters.lower.base import Base
from tests.conftest import TinyModels
from tests.parity.variants import VARIANTS, make_adapter
from tests.server.adapters.lower.hostile import JSON, faults

Files = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.fixture(scope="module")
def checkpoint(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Files:
    path: Path = make_adapter(VARIANTS[0], "llama", tiny_models("llama"), tmp_path_factory.mktemp("adapter"))
    return json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors")


@pytest.mark.parametrize("name", [*REFUSED, "NONSENSE", "", None, 3, "lora"])
def test_unsupported_methods_say_what_is_supported(name: Any, base: Base, checkpoint: Files) -> None:
    with pytest.raises(LoweringError) as caught:
        lower(Checkpoint({"peft_type": name}, checkpoint[1]), base)
    fault = caught.value.faults[0]
    assert fault.code == "unsupported_method"
    assert REFUSED.get(str(name), "LORA") in fault.message


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lora_alpha", float("nan")), ("lora_alpha", "8"), ("r", 0), ("r", 10**9), ("r", True), ("bias", "some"), ("use_dora", "yes"),
        ("init_lora_weights", "corda"), ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "loftq"), ("use_qalora", True),
        ("layer_replication", [[0, 4]]), ("target_parameters", ["x"]), ("arrow_config", {"a": 1}), ("kasa_config", {"a": 1}),
        ("unknown", 1), ("alora_invocation_tokens", [-1]), ("alora_invocation_tokens", "hello"), ("trainable_token_indices", {"a": "b"}),
        ("rank_pattern", {"(a+)+$": 4}), ("rank_pattern", [1]), ("alpha_pattern", {".*": 4}), ("alpha_pattern", {"q_proj": "x"}),
    ],
)  # fmt: skip
def test_fields_out_of_range_are_named(field: str, value: Any, base: Base, checkpoint: Files) -> None:
    config, tensors = checkpoint
    found = faults({**config, field: value}, tensors, base)
    assert found[f"adapter_config.json: {field}"] == "unsupported_field"


def test_unknown_fields_that_say_nothing_are_harmless(base: Base, checkpoint: Files) -> None:
    config, tensors = checkpoint
    assert lower(Checkpoint({**config, "new_option": None, "another": False, "empty": {}}, tensors), base).edits


def test_all_tensor_faults_come_together(base: Base, checkpoint: Files) -> None:
    config, tensors = checkpoint
    keys = sorted(tensors)
    spoiled = dict(tensors)
    spoiled[keys[0]] = torch.zeros(4, 5)
    del spoiled[keys[3]]
    spoiled["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 32)
    spoiled[keys[6].replace("lora_A.weight", "extra")] = torch.zeros(2)
    spoiled[keys[8]] = spoiled[keys[8]].to(torch.int32)
    assert set(faults(config, spoiled, base).values()) >= {"wrong_shape", "missing_tensor", "wrong_dtype"}
    only_extra = {**tensors, "base_model.model.nowhere.w": torch.zeros(1), keys[0] + ".more": torch.zeros(1)}
    assert set(faults(config, only_extra, base).values()) == {"unmatched_tensor", "unused_tensor"}


def test_rank_must_agree_with_the_config(base: Base, checkpoint: Files) -> None:
    config, tensors = checkpoint
    assert set(faults({**config, "r": 5}, tensors, base).values()) == {"wrong_rank"}


def test_overflow_and_size_are_refused(base: Base, checkpoint: Files) -> None:
    config, tensors = checkpoint
    huge = {key: tensor * 1e37 for key, tensor in tensors.items()}
    assert set(faults({**config, "lora_alpha": 1e6}, huge, base).values()) == {"non_finite"}
    assert set(faults(config, tensors, base, max_bytes=100).values()) == {"program_too_large"}
    assert set(faults(config, {}, base).values()) == {"empty_adapter"}


def test_hostile_patterns_cost_nothing(base: Base, checkpoint: Files) -> None:
    config, tensors = checkpoint
    started = time.process_time()
    faults({**config, "rank_pattern": {"(x+x+)+y" * 20: 4}}, tensors, base)
    faults({**config, "rank_pattern": {f"m{index}": 4 for index in range(10_000)}}, tensors, base)
    assert time.process_time() - started < 2


@settings(max_examples=250)
@given(data=st.data())
def test_no_config_raises_anything_else(data: st.DataObject, base: Base, checkpoint: Files) -> None:
    config, tensors = checkpoint
    name = data.draw(st.sampled_from(sorted(name for library, name in methods() if library == "peft")))
    fields = sorted({*config, *methods()["peft", name].fields} - {"peft_type"})
    drawn = data.draw(st.dictionaries(st.sampled_from(fields) | st.text(max_size=8), JSON, max_size=5))
    chosen = data.draw(st.sets(st.sampled_from(sorted(tensors)), max_size=len(tensors)))
    with contextlib.suppress(LoweringError):
        lower(Checkpoint({**config, **drawn, "peft_type": name}, {key: tensors[key] for key in chosen}), base)
