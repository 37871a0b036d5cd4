"""A program survives packing, its file, and unpacking: every edit, flag and tensor."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.adapters.ir import (
    BottleneckEdit,
    EmbedEdit,
    FusionEdit,
    HeadEdit,
    HeadLayer,
    InterventionEdit,
    LinearEdit,
    NormEdit,
    Placement,
    Program,
    Prologue,
    SideEdit,
    TaskHead,
)
from server.adapters.packed import unpack_program
from server.adapters.program_file import read_program, write_program
from tests.conftest import TinyModels
from tests.harness import load_base_for_lowering

R = torch.randn


def everything() -> Program:
    layer = "model.layers.0"
    program = Program(notes={"relative_error": 0.25})
    program.add(
        f"{layer}.self_attn.q_proj",
        LinearEdit(down=R(3, 32), up=R(3, 32), in_scale=R(32), out_scale=R(32), shift=R(32), pair_scale=R(32), pair_group=4),
    )
    program.add(f"{layer}.mlp.up_proj", LinearEdit(rotation=R(8, 4, 4), dense=R(48, 32), left=R(6, 4), right=R(8, 8)))
    placed = Placement("gelu", source="sum", residual="sublayer", norm_first=True, replaces=True)
    bottleneck = BottleneckEdit(placed, R(5, 32), R(5, 32), R(5), R(32), R(32), R(32), R(32), R(32), weight=0.5)
    program.add(f"{layer}.mlp.down_proj", bottleneck)
    program.add(f"{layer}.mlp.down_proj", BottleneckEdit(Placement(), R(2, 32), R(2, 32)))
    program.add(f"{layer}.mlp.down_proj", FusionEdit(Placement(source="sum"), query=R(32, 32), query_bias=R(32), value=R(32, 32)))
    program.add(f"{layer}.self_attn", SideEdit(R(3, 2, 8), R(3, 2, 8), projected=False))
    program.add(layer, InterventionEdit(R(2, 32), None, R(2, 32), "relu", subtracts=False, positions=3))
    program.add("model.norm", NormEdit(weight=R(32)))
    program.add("model.embed_tokens", EmbedEdit(row_ids=torch.tensor([1, 7]), rows=R(2, 32)))
    program.add("lm_head", HeadEdit(row_ids=torch.tensor([1, 7]), rows=R(2, 32)))
    program.prologue = Prologue(R(2, 2, 2, 3, 8), R(4, 32), "model.embed_tokens", shifts=False, after_first=True)
    program.head = TaskHead("mean", [HeadLayer(R(6, 32), R(6), "tanh"), HeadLayer(R(2, 6))], ("no", "yes"), multi_label=True)
    return program


def shown(owner: Any) -> Any:
    return {
        item.name: value.tolist() if isinstance(value := getattr(owner, item.name), Tensor) else value for item in fields(owner)
    }


def test_a_program_survives_its_file(tiny_models: TinyModels, tmp_path: Path) -> None:
    spec = load_base_for_lowering(tiny_models("llama")).spec
    program = everything()
    write_program(tmp_path / "p.safetensors", program, program_id="p", facts={"rank": 5})
    packed = read_program(tmp_path / "p.safetensors")
    assert packed.facts == {"rank": 5, "notes": {"relative_error": 0.25}}
    assert (len(packed.prologue), packed.prologue.position_shift) == (7, 0)
    found = unpack_program(packed, spec)
    assert list(found.edits) == list(program.edits)
    for site, edits in program.edits.items():
        kinds = {type(edit).__name__ for edit in edits}
        assert {type(edit).__name__ for edit in found.edits[site]} == kinds
        for kind in kinds:
            expected = [shown(edit) for edit in edits if type(edit).__name__ == kind]
            assert [shown(edit) for edit in found.edits[site] if type(edit).__name__ == kind] == expected
    assert shown(found.prologue) == shown(program.prologue)
    assert found.head is not None
    assert program.head is not None
    assert [shown(layer) for layer in found.head.layers] == [shown(layer) for layer in program.head.layers]
    assert (found.head.pooling, found.head.labels, found.head.multi_label) == ("mean", ("no", "yes"), True)
    assert (found.invocation_tokens, found.notes, found.nbytes) == ((), program.notes, program.nbytes)
    program.prologue, program.invocation_tokens = Prologue(), (4, 5)
    write_program(tmp_path / "p.safetensors", program, program_id="p", facts={})
    assert unpack_program(read_program(tmp_path / "p.safetensors"), spec).invocation_tokens == (4, 5)


def test_a_prologue_of_a_program_that_acts_later_is_never_written(tmp_path: Path) -> None:
    program = Program(invocation_tokens=(5, 6), prologue=Prologue(tokens=torch.zeros(2, 32), tokens_site="e"))
    with pytest.raises(ValueError, match="prologue"):
        write_program(tmp_path / "p.safetensors", program, program_id="p", facts={})
    assert not list(tmp_path.iterdir())
