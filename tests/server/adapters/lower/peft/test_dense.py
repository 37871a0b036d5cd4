"""Hostile checkpoints of the methods that need the base's weight, and of Medley's own: LoweringError, and nothing else."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from server.adapters.faults import LoweringError
from server.adapters.lower import Checkpoint, lower, methods
from server.adapters.lower.base import Base
from tests.conftest import TinyModels
from tests.parity.cases import make_checkpoint
from tests.parity.test_dense import CASES
from tests.parity.test_lora_variants import CASES as LORA_CASES
from tests.server.adapters.lower.hostile import JSON

Files = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.fixture(scope="module")
def checkpoints(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    found: dict[str, Files] = {}
    for case in (*CASES, *LORA_CASES):
        # Projections that a seed replaces are warned of; those checkpoints differ from the stored ones in one field.
        if not case.name.startswith("randlora-"):
            path = make_checkpoint(case, "llama", tiny_models("llama"), tmp_path_factory.mktemp("adapter"))
            config = json.loads((path / "adapter_config.json").read_text())
            found[case.name] = config, load_file(path / "adapter_model.safetensors")
    weights = load_file(tiny_models("llama") / "model.safetensors")
    found["fine-tune"] = {"medley_type": "FINE_TUNE", "rank": 2}, {name: tensor + 0.1 for name, tensor in weights.items()}
    found["bitfit"] = {"medley_type": "BITFIT"}, {"model.layers.0.mlp.up_proj.bias": torch.ones(48)}
    return found


def faults(checkpoint: Files, base: Base) -> set[str]:
    with pytest.raises(LoweringError) as caught:
        lower(Checkpoint(*checkpoint), base)
    return {fault.code for fault in caught.value.faults}


@pytest.mark.parametrize(
    ("name", "settings", "code"),
    [
        ("randlora", {"r": 4}, "wrong_shape"),
        ("randlora", {"save_projection": False}, "unmatched_tensor"),
        ("randlora", {"save_projection": False, "r": 4096}, "unsupported_field"),
        ("fourierft", {"n_frequency": 10**9}, "wrong_rank"),
        ("fourierft", {"random_loc_seed": None}, "unsupported_field"),
        ("waveft", {"wavelet_family": "sym2"}, "unsupported_field"),
        ("peanut", {"depth": 64}, "missing_tensor"),
        ("peanut", {"depth": 65}, "unsupported_field"),
        ("peanut", {"act_fn": "system"}, "unsupported_field"),
        ("peanut-deep", {"depth": 1}, "unused_tensor"),
        ("deft", {"para": True}, "unused_tensor"),
        ("deft-para", {"para": False}, "missing_tensor"),
        ("frod", {"save_projection": False}, "unsupported_field"),
        ("kasa", {"use_bdlora": {"nblocks": 2}}, "unsupported_field"),
    ],
)
def test_configs_that_do_not_fit_the_tensors(
    name: str, settings: dict[str, Any], code: str, base: Base, checkpoints: dict[str, Files]
) -> None:
    config, tensors = checkpoints[name]
    assert code in faults((config | settings, tensors), base)


@pytest.mark.parametrize(
    ("name", "tail", "value", "code"),
    [
        ("shira", "q_proj.shira_indices", torch.tensor([[0, 32], [1, 1]], dtype=torch.int32).repeat(1, 96), "wrong_shape"),
        ("shira", "q_proj.shira_indices", torch.tensor([[0], [1]], dtype=torch.int32), "missing_tensor"),
        ("shira", "q_proj.shira_indices", torch.zeros(2, 192), "wrong_dtype"),
        ("randlora", "q_proj.randlora_A", torch.zeros(5, 1, 32), "duplicate_tensor"),
        ("c3a", "q_proj.c3a_kernel", torch.zeros(4, 4, 7), "wrong_shape"),
        ("osf", "q_proj.osf_svd_params.S_low", torch.zeros(40), "wrong_rank"),
        ("hira", "q_proj.hira_A", torch.zeros(3, 32), "wrong_rank"),
        ("glora", "q_proj.glora_B.Xd", torch.zeros(32, 7), "missing_tensor"),
        ("glora-vector", "q_proj.glora_A.X", torch.zeros(31, 1), "wrong_shape"),
        ("glora-vector", "q_proj.glora_E.X", torch.ones(32), "unmatched_tensor"),
        ("glora-constant", "q_proj.glora_C.zeros", torch.ones(1), "unused_tensor"),
        ("peanut", "q_proj.peanut_B.weight", torch.zeros(32, 3), "wrong_rank"),
        ("frod", "frod_s_indices.self_attn_q_proj", torch.full((2, 51), -1), "wrong_shape"),
        ("frod", "frod_s_size.self_attn_q_proj", torch.tensor([2**40, 2**40]), "wrong_shape"),
        ("frod", "frod_V.self_attn_q_proj", torch.zeros(31, 31), "wrong_shape"),
    ],
)
def test_tensors_that_do_not_fit(
    name: str, tail: str, value: Tensor, code: str, base: Base, checkpoints: dict[str, Files]
) -> None:
    config, tensors = checkpoints[name]
    key = next((key for key in tensors if key.endswith(tail)), f"base_model.model.model.layers.0.self_attn.{tail}")
    assert code in faults((config, tensors | {key: value}), base)


def test_a_matrix_of_a_linear_method_elsewhere_is_refused(base: Base, checkpoints: dict[str, Files]) -> None:
    config, tensors = checkpoints["shira"]
    assert "wrong_module" in faults((config, tensors | {"base_model.model.model.norm.shira_weight": torch.ones(3)}), base)


def test_a_singular_basis_is_served_as_the_reference_does(base: Base, checkpoints: dict[str, Files]) -> None:
    config, tensors = checkpoints["frod"]
    key = "base_model.frod_V.self_attn_q_proj"
    assert lower(Checkpoint(config, tensors | {key: torch.ones_like(tensors[key])}), base).edits


MUTATIONS = {
    "empty": lambda tensor: tensor[:0],
    "cut": lambda tensor: tensor[: max(1, tensor.shape[0] // 2)],
    "turned": lambda tensor: tensor.transpose(0, -1),
    "flat": lambda tensor: tensor.reshape(-1),
    "whole": lambda tensor: tensor.round().long(),
    "wide": lambda tensor: tensor.double(),
    "huge": lambda tensor: torch.full_like(tensor, 1e30 if tensor.is_floating_point() else 10**6),
    "zero": torch.zeros_like,
    "scalar": lambda tensor: tensor.sum(),
}


@settings(max_examples=200)
@given(data=st.data())
def test_nothing_raises_anything_else(data: st.DataObject, base: Base, checkpoints: dict[str, Files]) -> None:
    config, tensors = checkpoints[data.draw(st.sampled_from(sorted(checkpoints)))]
    library, name = ("peft", config["peft_type"]) if "peft_type" in config else ("medley", config["medley_type"])
    fields = sorted(set(methods()[library, name].fields) - {"peft_type", "medley_type"})
    drawn = data.draw(st.dictionaries(st.sampled_from(fields), JSON, max_size=2))
    changed = dict(tensors)
    for key in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=4)):
        if data.draw(st.booleans()):
            changed.pop(key, None)
        else:
            changed[key] = MUTATIONS[data.draw(st.sampled_from(sorted(MUTATIONS)))](tensors[key])
    with contextlib.suppress(LoweringError):
        lower(Checkpoint({**config, **drawn}, changed), base)
