"""AdapterHub checkpoints that are hostile, old or incomplete: one typed refusal each, and what older versions of the library meant."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.adapters.faults import LoweringError
from server.adapters.ir import BottleneckEdit, LinearEdit, Program
from server.adapters.lower import Checkpoint, lower, methods
from server.adapters.lower.base import Base
from server.adapters.lowerer import LowererClient
from tests.conftest import TinyModels
from tests.harness import load_base_for_lowering
from tests.parity.golden import GOLDEN, base_directory, golden_files, read_golden
from tests.server.adapters.lower.hostile import JSON
from tests.server.adapters.lower.hostile import checkpoint_faults as codes


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base_for_lowering(base_directory("llama"))


def golden(name: str) -> Checkpoint:
    return read_golden(GOLDEN / "cases" / f"llama-{name}")


def changed(checkpoint: Checkpoint, **fields: Any) -> Checkpoint:
    """The checkpoint with other fields in its method's config."""
    config = copy.deepcopy(dict(checkpoint.config))
    config["config"].update(fields)
    return replace(checkpoint, config=config)


@pytest.mark.parametrize(
    ("case", "field", "value"),
    [
        ("seq_bn", "use_gating", True), ("seq_bn", "inv_adapter", "nice"), ("seq_bn", "scaling", "wild"), ("seq_bn", "unknown", 1),
        ("seq_bn", "non_linearity", "softmax"), ("seq_bn", "non_linearity", 3), ("seq_bn", "residual_before_ln", "post_add"),
        ("lora", "use_gating", True), ("lora", "attn_matrices", ["o"]), ("lora", "composition_mode", "mix"), ("lora", "r", 0),
        ("loreft", "suffix_positions", 1), ("prefix", "prefix_length", 10**9), ("prefix", "leave_out", [1]),
        ("fusion", "temperature", True), ("fusion", "residual_before", True),
    ],
)  # fmt: skip
def test_options_that_are_not_served_are_named(case: str, field: str, value: Any, base: Base) -> None:
    found = codes(changed(golden(case), **{field: value}), base)
    file = "adapter_fusion_config.json" if case == "fusion" else "adapter_config.json"
    assert found == {f"{file}: config.{field}": "unsupported_field"}


def test_flags_and_tensors_must_agree(base: Base) -> None:
    assert set(codes(changed(golden("seq_bn"), ln_before=True), base).values()) >= {"missing_tensor"}
    assert set(codes(changed(golden("seq_bn"), phm_layer=True), base).values()) >= {"missing_tensor"}
    assert set(codes(changed(golden("ln_after"), ln_after=False), base).values()) == {"unused_tensor"}
    assert set(codes(changed(golden("lora"), r=5), base).values()) == {"wrong_shape"}
    assert set(codes(changed(golden("prefix_flat"), prefix_length=4), base).values()) >= {"wrong_shape"}


def test_another_adapters_keys_are_not_taken(base: Base) -> None:
    checkpoint = golden("seq_bn")
    assert "unmatched_tensor" in codes(replace(checkpoint, config={**checkpoint.config, "name": "other"}), base).values()


def test_a_fusion_needs_its_children_and_they_their_checks(base: Base) -> None:
    fusion = golden("fusion")
    assert codes(replace(fusion, children={}), base) == {"adapter_fusion_config.json: name": "missing_child"}
    gated = changed(fusion.children["child_b"], use_gating=True)
    where = codes(replace(fusion, children={**fusion.children, "child_b": gated}), base)
    assert where == {"child_b: adapter_config.json: config.use_gating": "unsupported_field"}


def test_gemma2_has_no_place_for_bottlenecks(tiny_models: TinyModels) -> None:
    found = codes(golden("seq_bn"), load_base_for_lowering(tiny_models("gemma2")))
    assert found == {"adapter_config.json: config": "unsupported_method"}


def test_aliases_may_be_stored_twice_but_must_be_equal(base: Base) -> None:
    checkpoint = golden("ln_before")
    doubled = {key.replace("adapter_down.0.", "adapter_norm_before."): tensor for key, tensor in checkpoint.tensors.items()}
    twice = {**checkpoint.tensors, **doubled}
    assert _same(lower(replace(checkpoint, tensors=twice), base), lower(checkpoint, base))
    key = next(key for key in twice if "adapter_norm_before" in key)
    assert "duplicate_tensor" in codes(replace(checkpoint, tensors={**twice, key: twice[key] + 1}), base).values()


def test_files_without_a_version_name_other_activations(base: Base) -> None:
    checkpoint = changed(golden("seq_bn"), non_linearity="gelu")
    old = replace(checkpoint, config={key: value for key, value in checkpoint.config.items() if key != "version"})
    assert (_activation(lower(checkpoint, base)), _activation(lower(old, base))) == ("gelu", "gelu_new")


def test_old_task_adapters_name_a_network_that_they_do_not_have(base: Base) -> None:
    checkpoint = changed(golden("seq_bn"), invertible_adapter={"block_type": "nice", "reduction_factor": 2})
    assert codes(checkpoint, base) == {"adapter_config.json: config.invertible_adapter": "unsupported_field"}
    task = replace(checkpoint, config={**checkpoint.config, "type": "text_task"})
    assert _same(lower(task, base), lower(golden("seq_bn"), base))
    network = {**task.tensors, "model.invertible_adapters.golden.F.0.weight": torch.ones(2, 2)}
    assert set(codes(replace(task, tensors=network), base).values()) == {"unmatched_tensor"}


def test_old_names_of_bottlenecks(base: Base) -> None:
    checkpoint = golden("seq_bn")
    legacy = {
        key.replace(".adapters.golden", ".layer_text_task_adapters.golden"): value for key, value in checkpoint.tensors.items()
    }
    assert _same(lower(replace(checkpoint, tensors=legacy), base), lower(checkpoint, base))


@pytest.mark.parametrize(("version", "scale"), [("adapters.1.3.0", 1.5), ("adapters.1.0.1", 1.0), ("0.9", 1.5)])
def test_versions_before_1_1_scaled_lora_by_one(version: str, scale: float, base: Base) -> None:
    checkpoint = golden("lora")
    program = lower(replace(checkpoint, config={**checkpoint.config, "version": version}), base)
    edit = program.edits["model.layers.0.self_attn.q_proj"][0]
    assert isinstance(edit, LinearEdit)
    assert edit.up is not None
    stored = checkpoint.tensors["model.layers.0.self_attn.q_proj.loras.golden.lora_B"]
    torch.testing.assert_close(edit.up, stored.T * scale)


def test_a_head_that_equals_the_bases_costs_nothing(base: Base) -> None:
    assert "lm_head" not in lower(golden("lm_head"), base).edits
    assert "lm_head" in lower(golden("lm_head_trained"), base).edits


def test_a_head_beside_another_librarys_adapter_is_not_ignored(base: Base) -> None:
    probe = Checkpoint({"medley_type": "PROBE"}, {"0.weight": torch.ones(2, 32), "0.bias": torch.ones(2)})
    assert lower(probe, base).head is not None
    assert codes(replace(probe, head=golden("lm_head").head), base) == {"model_head.safetensors": "unused_tensor"}


@pytest.mark.parametrize("case", ["seq_bn", "phm_own", "lora", "prefix", "mam", "loreft", "fusion"])
@settings(max_examples=60)
@given(data=st.data())
def test_no_config_raises_anything_else(case: str, data: st.DataObject, base: Base) -> None:
    checkpoint = golden(case)
    known = {
        *checkpoint.config["config"],
        *(field for (owner, _), item in methods().items() if owner == "adapters" for field in item.fields),
    }
    outer = data.draw(st.dictionaries(st.sampled_from(sorted(known)), JSON, max_size=2))
    inner = data.draw(st.dictionaries(st.sampled_from(sorted(known)), JSON, max_size=3))
    spoiled = changed(checkpoint, **inner)
    spoiled = replace(spoiled, config={**spoiled.config, **outer, "version": "adapters.1.3.0"})
    with contextlib.suppress(LoweringError):
        lower(spoiled, base)


@pytest.mark.parametrize("case", ["phm_factors", "lora", "prefix", "loreft", "fusion"])
@settings(max_examples=30)
@given(data=st.data())
def test_no_tensor_raises_anything_else(case: str, data: st.DataObject, base: Base) -> None:
    checkpoint = golden(case)
    tensors = dict(checkpoint.tensors)
    for key in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3)):
        shape = data.draw(st.lists(st.sampled_from((0, 1, 2, 4, 32, 40)), max_size=4))
        tensors[key] = torch.zeros(shape, dtype=data.draw(st.sampled_from((torch.float32, torch.int64))))
    with contextlib.suppress(LoweringError):
        lower(replace(checkpoint, tensors=tensors), base)


async def test_the_lowering_process_reads_every_file_of_an_adapter(tmp_path: Path) -> None:
    client = LowererClient(base_directory("llama"), "0" * 64, "float32", tmp_path)
    await client.start(stored=())
    try:
        with client.using((("sha256:1", 1.0),), since=0), client.using((("sha256:2", 1.0),), since=0):
            fusion = await client.ensure(
                "acme", "sha256:1", lambda: contextlib.nullcontext(golden_files(GOLDEN / "cases" / "llama-fusion"))
            )
            head = GOLDEN / "cases" / "llama-lm_head_trained"
            headed = await client.ensure("acme", "sha256:2", lambda: contextlib.nullcontext(golden_files(head)))
    finally:
        await client.stop()
    assert (fusion.facts["method"], fusion.facts["sites"]) == ("fusion", 2)
    assert headed.facts["modules"] == ["down_proj", "lm_head"]


def _activation(program: Program) -> str:
    return next(
        edit.placement.activation for edits in program.edits.values() for edit in edits if isinstance(edit, BottleneckEdit)
    )


def _same(one: Program, other: Program) -> bool:
    pairs = list(zip(one.tensors(), other.tensors(), strict=True))
    return all(a[0] == b[0] and a[2] == b[2] and torch.equal(a[3], b[3]) for a, b in pairs)
