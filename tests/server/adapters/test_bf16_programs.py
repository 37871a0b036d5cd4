"""Programs whose matrices bf16 holds exactly are kept in it on an fp32 base, and nothing that is computed with them changes by a bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.adapters.apply import StepEdits
from server.adapters.bank import Bank
from server.adapters.base_spec import SiteSpec
from server.adapters.bottleneck import run_sublayer, sublayer_work
from server.adapters.ir import BottleneckEdit, Edit, FusionEdit, LinearEdit, Placement, Program
from server.adapters.kernels import NativeEdits
from server.adapters.native_linear import NativeLinearWork
from server.adapters.packed import PackedProgram, pack_program, unpack_program
from server.adapters.program_file import read_program, write_program
from server.adapters.streams import Streams
from tests.server.adapters.conftest import native, small_spec

# Neither a multiple of a vector's width: the ends of rows are computed number by number.
IN, OUT, SITE = 27, 43, "linear"
SPEC = small_spec(IN, SiteSpec(SITE, "linear", IN, OUT, False, 0))


def exact(*shape: int) -> Tensor:
    return torch.randn(*shape).to(torch.bfloat16).float()


def program(*edits: Edit) -> Program:
    made = Program()
    for edit in edits:
        made.add(SITE, edit)
    return made


def low_rank(rank: int) -> LinearEdit:
    return LinearEdit(down=exact(rank, IN), up=exact(rank, OUT), shift=torch.randn(OUT))


@pytest.fixture
def kernel(kernel_dir: Path) -> NativeEdits:
    return native(kernel_dir, torch.float32)


def banks(programs: Sequence[PackedProgram]) -> tuple[Bank, Bank, list[int]]:
    """One that keeps them as they are and one that does not, and the slots that they have in both."""
    made = []
    for keeps in (True, False):
        bank = Bank(SPEC, capacity_bytes=1 << 20, max_slots=16, dtype=torch.float32, device=torch.device("cpu"), keeps_bf16=keeps)
        slots = []
        for item in programs:
            resident = bank.admit(item).resident
            assert resident is not None
            assert resident.rows_dtype is (item.rows.dtype if keeps else torch.float32)
            slots.append(resident.slot)
        made.append(bank)
    return made[0], made[1], slots


def test_only_what_bf16_holds_exactly_is_packed_in_it() -> None:
    inexact = low_rank(3)
    assert inexact.up is not None
    inexact.up[2, 5] = 1 + 2**-8
    packed = [
        pack_program(program(low_rank(3), edit), program_id="p")
        for edit in (BottleneckEdit(Placement(), *exact(2, 4, IN)), inexact)
    ]
    assert [item.rows.dtype for item in packed] == [torch.bfloat16, torch.float32]
    assert all(item.vectors.dtype is torch.float32 for item in packed)
    wide = program(LinearEdit(down=exact(2, IN).double(), up=exact(2, OUT).double()))
    assert pack_program(wide, program_id="p").rows.dtype is torch.float64


def test_a_program_in_bf16_is_that_of_its_file(tmp_path: Path) -> None:
    edit, path = low_rank(3), tmp_path / "p.safetensors"
    write_program(path, program(edit), program_id="p", facts={})
    packed = read_program(path)
    assert packed.rows.dtype is torch.bfloat16
    (found,) = unpack_program(packed, SPEC).edits[SITE]
    assert isinstance(found, LinearEdit)
    for name in ("down", "up", "shift"):
        given, read = getattr(edit, name), getattr(found, name)
        assert read.dtype is torch.float32
        assert torch.equal(read, given)


def test_a_linear_computes_the_same_beside_programs_in_fp32(kernel: NativeEdits) -> None:
    inexact = LinearEdit(down=torch.randn(5, IN), up=torch.randn(5, OUT))
    edits = [low_rank(1), inexact, low_rank(16), replace(low_rank(3), dense=torch.randn(OUT, IN), in_scale=torch.randn(IN))]
    short, wide, slots = banks([pack_program(program(edit), program_id=str(index)) for index, edit in enumerate(edits)])
    bounds = [0, 1, 3, 36, 40]
    runs = list(zip(slots, bounds, bounds[1:], strict=False))
    x, z = torch.randn(40, IN), torch.randn(40, OUT)
    found = []
    for bank in (short, wide):
        work = StepEdits(bank, runs, kernel).linear(SITE, IN, OUT)
        assert isinstance(work, NativeLinearWork)
        found.append(work.after(z.clone(), x))
    assert not torch.equal(found[0], z)
    assert torch.equal(*found)


@pytest.mark.parametrize("activation", ["relu", "leakyrelu"])
def test_bottlenecks_compute_the_same_also_where_pytorch_does(activation: str, kernel: NativeEdits) -> None:
    def bottleneck() -> BottleneckEdit:
        return BottleneckEdit(Placement(activation), *exact(2, 5, IN), torch.randn(5))

    fused = program(*(bottleneck() for _ in range(3)), FusionEdit(Placement(), torch.randn(IN, IN), torch.randn(IN)))
    programs = [program(bottleneck()), program(BottleneckEdit(Placement(activation), *torch.randn(2, 4, IN))), fused]
    short, wide, slots = banks([pack_program(item, program_id=str(index)) for index, item in enumerate(programs)])
    runs = [(slots[0], 0, 20), (slots[1], 20, 22), (slots[2], 22, 24)]
    s = torch.randn(24, IN)
    found = []
    for bank in (short, wide):
        work = sublayer_work(StepEdits(bank, runs, kernel), SITE, IN)
        assert work is not None
        found.append(run_sublayer(work, Streams(s, None), bank.vectors).t)
    assert torch.equal(*found)
