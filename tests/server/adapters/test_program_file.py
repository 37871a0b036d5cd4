"""A program survives packing, its file, and unpacking: every edit, flag and tensor."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
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


def broken(content: bytes) -> dict[str, bytes]:
    """What a program file must not be, by what is wrong with it."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])

    def with_header(change: dict[str, object]) -> bytes:
        text = json.dumps({**header, **change}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + content[start:]

    rows = header["rows"]
    first, last = rows["data_offsets"]
    return {
        "nothing": b"",
        "half a length": content[:5],
        "cut header": content[: start - 1],
        "cut tensors": content[:-1],
        "more behind": content + b"\0",
        "no JSON": content[:8] + b"\0" * (start - 8) + content[start:],
        "no metadata": with_header({"__metadata__": {}}),
        "no rows": with_header({"rows": {**rows, "dtype": "F3"}}),
        "a wrong shape": with_header({"rows": {**rows, "shape": [rows["shape"][0] + 1]}}),
        "an overlap": with_header({"rows": {**rows, "data_offsets": [first - 4, last - 4]}}),
        "beyond the end": with_header({"rows": {**rows, "data_offsets": [first + 4, last + 4]}}),
        "a list for a tensor": with_header({"rows": []}),
    }


@pytest.mark.parametrize("fault", list(broken(b"\x40\0\0\0\0\0\0\0" + b'{"rows":{"shape":[1],"data_offsets":[0,4]}}'.ljust(64))))
def test_a_file_that_is_not_whole_and_well_formed_is_refused(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    write_program(path, everything(), program_id="p", facts={})
    path.write_bytes(broken(path.read_bytes())[fault])
    with pytest.raises(ValueError, match=r"."):
        read_program(path)


def test_tensors_are_those_that_the_library_reads(tmp_path: Path) -> None:
    """``safetensors`` itself is the slow reference: it copies every tensor."""
    path = tmp_path / "p.safetensors"
    write_program(path, everything(), program_id="p", facts={})
    packed, reference = read_program(path), load_file(path)
    found = {"rows": packed.rows, "vectors": packed.vectors, **packed.extras}
    assert found.keys() == reference.keys()
    for name, tensor in reference.items():
        assert torch.equal(found[name], tensor)
        assert found[name].dtype == tensor.dtype
