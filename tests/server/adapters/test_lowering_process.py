"""The facts of a lowered program that others build on."""

from __future__ import annotations

import pytest
import torch

from server.adapters.ir import Program, Prologue
from server.adapters.lowering_process import _facts
from tests.conftest import TinyModels
from tests.harness import load_base_for_lowering


@pytest.mark.parametrize(
    ("family", "shifts", "room"), [("llama", True, 4), ("llama", False, 4), ("bert", True, 4), ("bert", False, 0)]
)
def test_room_taken_by_virtual_tokens(family: str, shifts: bool, room: int, tiny_models: TinyModels) -> None:
    """On encoders only what takes positions counts against the length."""
    base = load_base_for_lowering(tiny_models(family))
    program = Program(prologue=Prologue(tokens=torch.zeros(4, 32), tokens_site=base.spec.embedding, shifts=shifts))
    facts = _facts(program, base)
    assert (facts["virtual_tokens"], facts["room_taken"]) == (4, room)
