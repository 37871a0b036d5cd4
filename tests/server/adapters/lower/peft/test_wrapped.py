"""Refusals of the methods that wrap linears, norms and embeddings: whatever is wrong with a checkpoint is a LoweringError, and nothing else."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from server.adapters.faults import LoweringError
from server.adapters.ir import LinearEdit, Program
from server.adapters.lower import Checkpoint, lower, methods
from server.adapters.lower.base import Base
from tests.conftest import TinyModels
from tests.parity import test_low_rank, test_replacements, test_rotations
from tests.parity.cases import Case, make_checkpoint
from tests.server.adapters.lower.hostile import JSON, faults

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

CASES = {case.name: case for module in (test_low_rank, test_rotations, test_replacements) for case in module.CASES}
Files = tuple[dict[str, Any], dict[str, Tensor]]
GetFiles = Callable[[str], Files]


@pytest.fixture(scope="module")
def files(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> GetFiles:
    """case → its config and tensors, made on first use."""
    made: dict[str, Files] = {}

    def get(name: str) -> Files:
        if name not in made:
            path: Path = make_checkpoint(CASES[name], "llama", tiny_models("llama"), tmp_path_factory.mktemp(name))
            made[name] = (json.loads((path / "adapter_config.json").read_text()), load_file(path / "adapter_model.safetensors"))
        return made[name]

    return get


def one_of_each_kind(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The end of a key → the first key that has it."""
    kinds: dict[str, str] = {}
    for key in sorted(tensors):
        kinds.setdefault(key.rpartition(".")[2] if "layers" in key else key, key)
    return kinds


def linear_edits(program: Program) -> list[LinearEdit]:
    return [edit for edits in program.edits.values() for edit in edits if isinstance(edit, LinearEdit)]


@pytest.mark.parametrize("name", CASES)
def test_every_field_of_the_config_has_a_rule(name: str, files: GetFiles) -> None:
    config, _ = files(name)
    assert set(config) <= set(methods()["peft", config["peft_type"]].fields)


@pytest.mark.parametrize("name", CASES)
def test_a_tensor_that_is_missing_or_cut_or_elsewhere_is_a_fault(name: str, base: Base, files: GetFiles) -> None:
    config, tensors = files(name)
    for key in one_of_each_kind(tensors).values():
        if key.endswith("tinylora_P"):
            continue  # drawn again where it is missing
        siblings = [other for other in tensors if other.rpartition(".")[0] == key.rpartition(".")[0]]
        if len(siblings) > 1 or key.count(".") <= 2:  # a site of one tensor may be absent as a whole
            assert faults(config, {other: tensor for other, tensor in tensors.items() if other != key}, base)
        assert faults(config, {**tensors, key: tensors[key][..., :-1]}, base)
        assert faults(config, {**tensors, key: tensors[key][None]}, base)
        assert faults(config, {**tensors, key: tensors[key][:0]}, base)
        assert "wrong_dtype" in faults(config, {**tensors, key: tensors[key].to(torch.complex64)}, base).values()
        if ".layers.0." in key:
            moved = {**tensors, key.replace(".layers.0.", ".layers.0.input_layernorm."): tensors[key]}
            assert set(faults(config, moved, base).values()) & {"wrong_module", "unused_tensor", "unmatched_tensor"}


@pytest.mark.parametrize("value", [1e38, float("inf"), float("nan")])
@pytest.mark.parametrize("name", CASES)
def test_numbers_out_of_range_raise_nothing_else(name: str, value: float, base: Base, files: GetFiles) -> None:
    config, tensors = files(name)
    hostile = {key: tensor * value if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    with contextlib.suppress(LoweringError):
        lower(Checkpoint(config, hostile), base)


@pytest.mark.parametrize("name", ["vblora-short", "unilora", "supertuning"])
@pytest.mark.parametrize("index", [-1, 1 << 40])
def test_indices_out_of_range_are_refused(name: str, index: int, base: Base, files: GetFiles) -> None:
    config, tensors = files(name)
    key = next(key for key in sorted(tensors) if "indices" in key)
    spoiled = torch.full_like(tensors[key], index, dtype=torch.int64)
    assert set(faults(config, {**tensors, key: spoiled}, base).values()) == {"wrong_shape"}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("pvera", "sample_at_inference", True), ("vera", "r", 0), ("vera", "r", True), ("vera-drawn", "projection_prng_key", -1),
        ("vera-drawn", "projection_prng_key", 1 << 70), ("vera", "bias", "some"), ("loha", "alpha_pattern", {"q_proj": "x"}),
        ("loha", "alpha", float("nan")), ("miss", "init_weights", "other"), ("oft", "num_cayley_neumann_terms", 10**9),
        ("oft-constrained", "eps", float("inf")), ("road_1", "variant", "road_3"), ("road_1", "group_size", 7),
        ("road_1", "group_size", 0), ("vblora", "topk", 0), ("gralora", "hybrid_r", -1), ("tinylora", "weight_tying", 2),
        ("tinylora-drawn", "projection_seed", -3), ("unilora-drawn", "target_modules", ".*q_proj"),
        ("unilora-drawn", "target_modules", [1]), ("unilora-drawn", "modules_to_save", "lm_head"),
        ("unilora-drawn", "layers_pattern", "(x+x+)+y"), ("trainable-tokens", "token_indices", [7, 7, 7, 7]),
        ("trainable-tokens", "token_indices", [1, 2, 3, 10**9]), ("trainable-tokens", "token_indices", "all"),
        ("supertuning", "save_precomputed_indices", False), ("supertuning-low-rank", "lora_alpha", None),
    ],
)  # fmt: skip
def test_fields_out_of_range_are_named(name: str, field: str, value: Any, base: Base, files: GetFiles) -> None:
    config, tensors = files(name)
    assert faults({**config, field: value}, tensors, base)[f"adapter_config.json: {field}"] == "unsupported_field"


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("loha", "rank_pattern", {"q_proj": 7}),
        ("lokr", "rank_pattern", {"q_proj": 0}),
        ("delora", "r", 5),
        ("lokr-factors", "r", 2),
    ],
)
def test_ranks_must_agree_with_the_config(name: str, field: str, value: Any, base: Base, files: GetFiles) -> None:
    config, tensors = files(name)
    assert set(faults({**config, field: value}, tensors, base).values()) == {"wrong_rank"}


def test_several_tasks_are_refused(base: Base) -> None:
    found = faults({"peft_type": "POLY", "n_tasks": 3}, {"x": torch.ones(1)}, base)
    assert found == {"adapter_config.json: n_tasks": "unsupported_field"}


@pytest.mark.parametrize("shape", [(6, 4, 8, 8), (1, 3, 8, 8), (2, 32, 1, 1), (70, 4, 8, 8)])
def test_butterfly_factors_must_divide_the_inputs(shape: tuple[int, ...], base: Base) -> None:
    tensors = {f"{SITE}.boft_R": torch.zeros(shape), f"{SITE}.boft_s": torch.ones(32, 1)}
    assert faults({"peft_type": "BOFT"}, tensors, base) == {f"{SITE.removeprefix('base_model.model.')}.boft_R": "wrong_shape"}


def test_oft_from_before_the_series_changed_says_so(base: Base, files: GetFiles) -> None:
    config, tensors = files("oft")
    assert not lower(Checkpoint(config, tensors), base).notes
    for version in (None, "0.17.1", "0.9"):
        assert "0.18" in str(lower(Checkpoint({**config, "peft_version": version}, tensors), base).notes["rotation"])
    assert not lower(Checkpoint({**config, "peft_version": None, "use_cayley_neumann": False}, tensors), base).notes


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("loha", {"down", "up"}), ("loha-dense", {"dense"}), ("lokr", {"left", "right"}), ("lokr-low-rank", {"down", "up"}),
        ("miss", {"down", "up"}), ("miss-bat", {"dense"}), ("oft-shared", {"rotation"}), ("road_4", {"out_scale", "pair_scale"}),
        ("supertuning-low-rank", {"dense", "down", "up"}), ("beft", {"shift"}),
    ],
)  # fmt: skip
def test_terms(name: str, fields: set[str], base: Base, files: GetFiles) -> None:
    edits = linear_edits(lower(Checkpoint(*files(name)), base))
    names = [name for name in LinearEdit.__dataclass_fields__ if name != "pair_group"]
    assert {name for edit in edits for name in names if getattr(edit, name) is not None} == fields


RANK = 60_000
SITE = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("config", "tensors"),
    [
        (
            {"peft_type": "VERA", "r": RANK, "save_projection": False},
            {f"{SITE}.vera_lambda_b": torch.ones(32), f"{SITE}.vera_lambda_d": torch.ones(RANK)},
        ),
        (
            {"peft_type": "VBLORA", "r": RANK, "num_vectors": 1, "vector_length": 32, "topk": 1},
            {
                "base_model.vblora_vector_bank": torch.ones(1, 32),
                f"{SITE}.vblora_logits_A": torch.ones(RANK, 1, 1),
                f"{SITE}.vblora_logits_B": torch.ones(1, RANK, 1),
            },
        ),
        (
            {"peft_type": "UNILORA", "r": 65536, "theta_d_length": 3, "target_modules": ["q_proj", "lm_head"]},
            {"base_model.unilora_theta_d": torch.ones(3)},
        ),
        (
            {"peft_type": "TINYLORA", "u": 65536, "save_projection": False},
            {
                "base_model.tinylora_v.0": torch.ones(65536),
                f"{SITE}.tinylora_A": torch.ones(32, 32),
                f"{SITE}.tinylora_B": torch.ones(32, 32),
            },
        ),
        (
            {"peft_type": "GRALORA", "r": RANK},
            {f"{SITE}.gralora_A": torch.ones(32, 1, RANK), f"{SITE}.gralora_B": torch.ones(32, RANK, 1)},
        ),
    ],
    ids=lambda item: item.get("peft_type", "") if isinstance(item, dict) else "",
)
def test_small_checkpoints_of_large_programs_make_nothing(config: dict[str, Any], tensors: dict[str, Tensor], base: Base) -> None:
    started = time.process_time()
    assert faults(config, tensors, base, max_bytes=1 << 20) == {"adapter": "program_too_large"}
    assert time.process_time() - started < 1


@settings(max_examples=120)
@given(data=st.data())
def test_no_config_raises_anything_else(data: st.DataObject, base: Base, files: GetFiles) -> None:
    case: Case = CASES[data.draw(st.sampled_from(sorted(CASES)))]
    config, tensors = files(case.name)
    drawn = data.draw(st.dictionaries(st.sampled_from(sorted(set(config) - {"peft_type"})), JSON, min_size=1, max_size=3))
    with contextlib.suppress(LoweringError):
        lower(Checkpoint({**config, **drawn}, tensors), base, max_bytes=1 << 22)
