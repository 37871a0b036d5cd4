"""Refusals of prompt-learning checkpoints: what does not fit the base or contradicts itself is named."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.adapters.faults import LoweringError
from server.adapters.ir import Program, Prologue
from server.adapters.lower import Checkpoint, Method, lower, methods
from server.adapters.lower.base import Base
from tests.conftest import TinyModels
from tests.harness import load_base_for_lowering
from tests.server.adapters.lower.hostile import JSON, checkpoint_faults

TOKENS: dict[str, Tensor] = {"prompt_embeddings": torch.randn(5, 32)}
PREFIX: dict[str, Tensor] = {"prompt_embeddings": torch.randn(5, 2 * 2 * 2 * 8)}
TASKS: dict[str, Tensor] = {**TOKENS, "prefix_task_cols": torch.randn(3, 5, 2), "prefix_task_rows": torch.randn(3, 2, 32)}
SIDE: dict[str, Tensor] = {
    "base_model.model.model.layers.1.self_attn.adaption_prompt": torch.randn(1, 4, 32),
    "base_model.model.model.layers.1.self_attn.adaption_gate": torch.randn(1),
}
TENSORS = {
    "PROMPT_TUNING": TOKENS,
    "P_TUNING": TOKENS,
    "CPT": TOKENS,
    "MULTITASK_PROMPT_TUNING": TASKS,
    "PREFIX_TUNING": PREFIX,
    "CARTRIDGE": PREFIX,
    "ADAPTION_PROMPT": SIDE,
}


def faults(method: str, tensors: dict[str, Tensor], base: Base, **config: Any) -> dict[str, str]:
    return checkpoint_faults(Checkpoint({"peft_type": method, **config}, tensors), base)


@pytest.mark.parametrize(
    ("method", "tensors", "config", "where", "code"),
    [
        ("PROMPT_TUNING", {}, {}, "prompt_embeddings", "missing_tensor"),
        ("PROMPT_TUNING", PREFIX, {}, "prompt_embeddings", "wrong_shape"),
        ("PROMPT_TUNING", {"prompt_embeddings": torch.zeros(5, 32, dtype=torch.int32)}, {}, "prompt_embeddings", "wrong_dtype"),
        ("PROMPT_TUNING", {"prompt_embeddings": torch.zeros(0, 32)}, {}, "adapter_model.safetensors", "empty_adapter"),
        ("PROMPT_TUNING", {"prompt_embeddings": torch.zeros(512, 32)}, {}, "adapter", "program_too_large"),
        ("PROMPT_TUNING", {**TOKENS, "more": torch.zeros(1)}, {}, "more", "unmatched_tensor"),
        ("PROMPT_TUNING", TOKENS, {"num_virtual_tokens": 6}, "adapter_config.json: num_virtual_tokens", "unsupported_field"),
        ("CPT", TOKENS, {"num_virtual_tokens": True}, "adapter_config.json: num_virtual_tokens", "unsupported_field"),
        ("P_TUNING", TOKENS, {"num_transformer_submodules": 2}, "adapter_config.json: num_transformer_submodules", "unsupported_field"),
        ("PREFIX_TUNING", TOKENS, {}, "prompt_embeddings", "wrong_shape"),
        ("PREFIX_TUNING", PREFIX, {"num_attention_heads": 4}, "adapter_config.json: num_attention_heads", "unsupported_field"),
        ("PREFIX_TUNING", PREFIX, {"num_layers": 3}, "adapter_config.json: num_layers", "unsupported_field"),
        ("CARTRIDGE", PREFIX, {"token_dim": 32}, "adapter_config.json: token_dim", "unsupported_field"),
        ("CARTRIDGE", {**PREFIX, **TASKS, **PREFIX}, {}, "prefix_task_cols", "unmatched_tensor"),
        ("MULTITASK_PROMPT_TUNING", TASKS, {}, "adapter_config.json: medley_task", "unsupported_field"),
        ("MULTITASK_PROMPT_TUNING", TASKS, {"medley_task": 3}, "adapter_config.json: medley_task", "unsupported_field"),
        ("MULTITASK_PROMPT_TUNING", TASKS, {"num_tasks": 2}, "adapter_config.json: num_tasks", "unsupported_field"),
        ("MULTITASK_PROMPT_TUNING", TASKS, {"num_ranks": 1}, "adapter_config.json: num_ranks", "unsupported_field"),
        ("MULTITASK_PROMPT_TUNING", TOKENS, {}, "prefix_task_cols, prefix_task_rows", "missing_tensor"),
        (
            "MULTITASK_PROMPT_TUNING",
            {**TASKS, "prefix_task_rows": torch.randn(3, 1, 32)},
            {},
            "prefix_task_cols, prefix_task_rows",
            "wrong_shape",
        ),
        ("ADAPTION_PROMPT", dict(list(SIDE.items())[:1]), {}, "model.layers.1.self_attn", "missing_tensor"),
        ("ADAPTION_PROMPT", SIDE, {"adapter_layers": 2}, "adapter_config.json: adapter_layers", "unsupported_field"),
        ("ADAPTION_PROMPT", SIDE, {"adapter_len": 5}, next(iter(SIDE)), "wrong_shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    method: str, tensors: dict[str, Tensor], config: dict[str, Any], where: str, code: str, base: Base
) -> None:
    assert faults(method, tensors, base, **config)[where] == code


def test_adaption_prompts_are_for_the_families_that_peft_has(tiny_models: TinyModels) -> None:
    found = faults("ADAPTION_PROMPT", SIDE, load_base_for_lowering(tiny_models("qwen2")))
    assert found == {"adapter_config.json: peft_type": "unsupported_method"}


def test_a_task_is_chosen_by_the_config(base: Base) -> None:
    program = lower(Checkpoint({"peft_type": "MULTITASK_PROMPT_TUNING", "medley_task": 2}, TASKS), base)
    expected = TOKENS["prompt_embeddings"] * (TASKS["prefix_task_cols"][2] @ TASKS["prefix_task_rows"][2])
    assert program.prologue.tokens is not None
    assert torch.equal(program.prologue.tokens, expected)


@pytest.mark.parametrize(("after_first", "invocation"), [(True, ()), (False, (5, 6))])
def test_what_no_request_that_generates_could_start_with_is_refused(
    after_first: bool, invocation: tuple[int, ...], base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Virtual tokens behind the first one, and a prologue of a program that acts only later."""
    prologue = Prologue(tokens=torch.randn(2, 32), tokens_site=base.spec.embedding, after_first=after_first)
    program = Program(prologue=prologue, invocation_tokens=invocation)
    method = Method("PROMPT_TUNING", "", {"peft_type": lambda _: None}, lambda source, _: program)
    monkeypatch.setattr("server.adapters.lower.method_of", lambda _: method)
    assert faults("PROMPT_TUNING", {}, base) == {"adapter": "unsupported_field"}


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 32, 64]), max_size=4)


@settings(max_examples=250)
@given(data=st.data())
def test_no_checkpoint_raises_anything_else(data: st.DataObject, base: Base) -> None:
    name = data.draw(st.sampled_from(sorted(TENSORS)))
    config = data.draw(
        st.dictionaries(st.sampled_from(sorted({*methods()["peft", name].fields} - {"peft_type"})), JSON, max_size=4)
    )
    tensors = dict(TENSORS[name])
    for key in data.draw(st.sets(st.sampled_from(sorted(tensors)))):
        tensors[key] = torch.ones(data.draw(SHAPES))
    with contextlib.suppress(LoweringError):
        lower(Checkpoint({**config, "peft_type": name}, tensors), base)
