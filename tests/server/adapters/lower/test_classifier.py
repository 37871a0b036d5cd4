"""Classifiers and probes that cannot be served: every fault says what is missing and how to get it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.adapters.faults import LoweringError
from server.adapters.lower import Checkpoint, lower
from server.adapters.lower.base import Base
from tests.conftest import TinyModels
from tests.harness import load_base_for_lowering
from tests.server.adapters.lower.hostile import JSON, checkpoint_faults

LORA: dict[str, Any] = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 4, "target_modules": ["query"]}
PROBE: dict[str, Any] = {"medley_type": "PROBE", "labels": ["a", "b"]}


def lora_tensors(
    extra: dict[str, tuple[int, ...]] | None = None, module: str = "query", prefix: str = "bert"
) -> dict[str, Tensor]:
    path = f"base_model.model.{prefix}.encoder.layer.0.attention.self.{module}"
    shapes = {f"{path}.lora_A.weight": (4, 32), f"{path}.lora_B.weight": (32, 4)}
    return {name: torch.ones(shape) for name, shape in {**shapes, **(extra or {})}.items()}


HEAD: dict[str, tuple[int, ...]] = {"base_model.model.classifier.weight": (3, 32), "base_model.model.classifier.bias": (3,)}


@pytest.fixture(scope="module")
def bert(tiny_models: TinyModels) -> Base:
    return load_base_for_lowering(tiny_models("bert"))


def faults(config: dict[str, Any], tensors: dict[str, Tensor], base: Base, labels: tuple[str, ...] = ()) -> dict[str, str]:
    return checkpoint_faults(Checkpoint(config, tensors, labels=labels), base)


def test_a_missing_classifier_is_named(bert: Base) -> None:
    assert faults(LORA, lora_tensors(), bert) == {"classifier.weight": "missing_tensor"}
    assert faults(LORA, lora_tensors({"base_model.model.classifier.weight": (3, 31)}), bert) == {
        "base_model.model.classifier.weight": "wrong_shape"
    }


def test_other_tasks_are_refused_by_name(bert: Base) -> None:
    found = faults({**LORA, "task_type": "QUESTION_ANS"}, lora_tensors({"base_model.model.qa_outputs.weight": (2, 32)}), bert)
    assert found["adapter_config.json: task_type"] == "unsupported_field"
    found = faults({**LORA, "task_type": "CAUSAL_LM"}, lora_tensors(HEAD), bert)
    assert set(found.values()) == {"unmatched_tensor"}


def test_the_wrapped_class_says_the_task_where_the_config_does_not(bert: Base) -> None:
    mapping = {"base_model_class": "BertForTokenClassification", "parent_library": "transformers.models.bert.modeling_bert"}
    program = lower(Checkpoint({**LORA, "task_type": None, "auto_mapping": mapping}, lora_tensors(HEAD)), bert)
    assert program.head is not None
    assert program.head.pooling == "none"


def test_labels_must_fit(bert: Base) -> None:
    program = lower(Checkpoint(LORA, lora_tensors(HEAD), labels=("x", "y", "z")), bert)
    assert program.head is not None
    assert program.head.labels == ("x", "y", "z")
    assert faults(LORA, lora_tensors(HEAD), bert, ("x", "y")) == {"labels": "wrong_shape"}
    assert faults(LORA, lora_tensors(HEAD), bert, ("x", "y", "x")) == {"labels": "unsupported_field"}


def test_a_base_without_pooler_cannot_carry_a_classifier_trained_on_a_random_one(
    bert: Base, tiny_models: TinyModels, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_models("bert"), bare)
    weights = {name: tensor for name, tensor in load_file(bare / "model.safetensors").items() if "pooler" not in name}
    save_file(weights, bare / "model.safetensors", metadata={"format": "pt"})
    base = load_base_for_lowering(bare)
    assert faults(LORA, lora_tensors(HEAD), base) == {"pooler.dense.weight": "missing_tensor"}
    pooler = {"base_model.model.bert.pooler.dense.weight": (32, 32), "base_model.model.bert.pooler.dense.bias": (32,)}
    assert lower(Checkpoint(LORA, lora_tensors({**HEAD, **pooler})), base).head is not None
    low_rank = {
        "base_model.model.bert.pooler.dense.lora_A.weight": (4, 32),
        "base_model.model.bert.pooler.dense.lora_B.weight": (32, 4),
    }
    refused = {**LORA, "use_dora": True}
    magnitude = {"base_model.model.bert.encoder.layer.0.attention.self.query.lora_magnitude_vector": (32,)}
    assert faults(refused, lora_tensors({**HEAD, **low_rank, **magnitude}), bert)["bert.pooler.dense"] == "wrong_module"


def test_distilbert_needs_what_stands_before_its_classifier(tiny_models: TinyModels) -> None:
    base = load_base_for_lowering(tiny_models("distilbert"))
    path = "base_model.model.distilbert.transformer.layer.0.attention.q_lin"
    tensors = {f"{path}.lora_A.weight": torch.ones(4, 32), f"{path}.lora_B.weight": torch.ones(32, 4)}
    tensors |= {name: torch.ones(shape) for name, shape in HEAD.items()}
    assert faults(LORA, tensors, base) == {"pre_classifier.weight": "missing_tensor"}


@pytest.mark.parametrize(
    ("config", "shapes", "where"),
    [
        ({}, {}, "0.weight"),
        ({}, {"0.weight": (2, 31)}, "0.weight"),
        ({}, {"0.weight": (3, 32)}, "labels"),
        ({}, {"0.weight": (4, 32), "0.bias": (3,), "1.weight": (2, 4)}, "0.bias"),
        ({}, {"0.weight": (2, 32), "2.weight": (2, 2)}, "2.weight"),
        ({"pooling": "max"}, {"0.weight": (2, 32)}, "adapter_config.json: pooling"),
        ({"activation": "softmax"}, {"0.weight": (2, 32)}, "adapter_config.json: activation"),
        ({"labels": ["a", "a"]}, {"0.weight": (2, 32)}, "labels"),
        ({"labels": ["a", 7]}, {"0.weight": (2, 32)}, "adapter_config.json: labels"),
        ({"dropout": 0.1}, {"0.weight": (2, 32)}, "adapter_config.json: dropout"),
    ],
)
def test_probes_that_are_refused(config: dict[str, Any], shapes: dict[str, tuple[int, ...]], where: str, bert: Base) -> None:
    assert where in faults({**PROBE, **config}, {name: torch.ones(shape) for name, shape in shapes.items()}, bert)


@settings(max_examples=150)
@given(data=st.data())
def test_no_config_raises_anything_else(data: st.DataObject, bert: Base) -> None:
    config, tensors = data.draw(
        st.sampled_from([(LORA, lora_tensors(HEAD)), (PROBE, {"0.weight": torch.ones(2, 32), "1.weight": torch.ones(2, 2)})])
    )
    fields = ["task_type", "auto_mapping", "labels", "pooling", "activation", "multi_label"]
    drawn = data.draw(st.dictionaries(st.sampled_from(fields), JSON, max_size=4))
    chosen = data.draw(st.sets(st.sampled_from(sorted(tensors))))
    with contextlib.suppress(LoweringError):
        lower(Checkpoint({**config, **drawn}, {key: tensors[key] for key in chosen}), bert)
