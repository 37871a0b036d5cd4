"""The native kernel does at a linear what the PyTorch path does: every term alone and all together, ragged runs, hostile neighbours."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.adapters.apply import EditCache, Run, StepEdits
from server.adapters.bank import Bank
from server.adapters.base_spec import SiteSpec
from server.adapters.ir import LinearEdit, Program
from server.adapters.kernels import Kernel
from server.adapters.linear import SiteWork
from server.adapters.native_linear import NativeLinearWork
from server.adapters.packed import PackedProgram, pack_program
from tests.server.adapters.conftest import native, small_spec

IN, OUT, SITE = 24, 40, "linear"
SPEC = small_spec(IN, SiteSpec(SITE, "linear", IN, OUT, False, 0))
TERMS = ("low_rank", "in_scale", "out_scale", "shift", "pairs", "rotation", "shared_rotation", "dense", "kron")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}


def linear_edit(terms: frozenset[str], seed: int, dtype: torch.dtype) -> LinearEdit:
    generator = torch.Generator().manual_seed(seed)

    def r(*shape: int, exact: bool = False) -> Tensor:
        made = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
        return made if exact else made.to(dtype)

    rank, group = 1 + seed % 7, (2, 4, 8, 40)[seed % 4]
    edit = LinearEdit()
    if "low_rank" in terms:
        edit.down, edit.up = r(rank, IN), r(rank, OUT)
    if "in_scale" in terms:
        edit.in_scale = r(IN, exact=True)
    if "out_scale" in terms:
        edit.out_scale = r(OUT, exact=True)
    if "shift" in terms:
        edit.shift = r(OUT, exact=True)
    if "pairs" in terms:
        edit.pair_scale, edit.pair_group = r(OUT, exact=True), group
    if "rotation" in terms:
        edit.rotation = r(6, 4, 4)
    if "shared_rotation" in terms:
        edit.rotation = r(1, 12, 12)
    if "dense" in terms:
        edit.dense = r(OUT, IN)
    if "kron" in terms:
        edit.left, edit.right = r(5, 3), r(8, 8)
    return edit


def packed(edit: LinearEdit, program_id: str) -> PackedProgram:
    program = Program()
    program.add(SITE, edit)
    return pack_program(program, program_id=program_id)


def make_bank(edits: list[LinearEdit], dtype: torch.dtype, capacity_bytes: int = 1 << 20) -> tuple[Bank, list[int]]:
    """The bank, and the slot of each edit's program."""
    bank = Bank(SPEC, capacity_bytes=capacity_bytes, max_slots=32, dtype=dtype, device=torch.device("cpu"))
    slots = []
    for index, edit in enumerate(edits):
        resident = bank.admit(packed(edit, str(index))).resident
        assert resident is not None
        slots.append(resident.slot)
    return bank, slots


def outcome(bank: Bank, runs: list[Run], kernel: Kernel | None, x: Tensor, base: Tensor) -> Tensor:
    """``y`` of the site with ``x @ base`` as its base, computed on the kernel that was asked for."""
    work = StepEdits(bank, runs, kernel).linear(SITE, IN, OUT)
    assert type(work) is (SiteWork if kernel is None else NativeLinearWork)
    return work.after(work.before(x) @ base, x)


def check(edits: list[LinearEdit], counts: list[int], dtype: torch.dtype, kernel_dir: Path) -> None:
    """Edit ``i`` owns ``counts[i]`` rows, with a row of the base before each."""
    bank, slots = make_bank(edits, dtype)
    runs, row = [], 0
    for slot, count in zip(slots, counts, strict=True):
        runs += [(0, row, row + 1), (slot, row + 1, row + 1 + count)]
        row += 1 + count
    generator = torch.Generator().manual_seed(row)
    x, base = torch.randn(row, IN, generator=generator).to(dtype), torch.randn(IN, OUT, generator=generator).to(dtype)
    exact = make_bank([widened(edit) for edit in edits], torch.float64)[0]
    expected = outcome(exact, runs, None, x.double(), base.double())
    given_x = x.clone()
    found = outcome(bank, runs, native(kernel_dir, dtype), x, base)
    assert torch.equal(x, given_x), "what other sites read too was changed"
    assert float((found.double() - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


def widened(edit: LinearEdit) -> LinearEdit:
    made = copy.copy(edit)
    for name in LinearEdit.__slots__:
        if isinstance(value := getattr(edit, name), Tensor):
            setattr(made, name, value.double())
    return made


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("term", TERMS)
def test_every_term_equals_the_reference(term: str, dtype: torch.dtype, kernel_dir: Path) -> None:
    edits = [linear_edit(frozenset({term}), seed, dtype) for seed in range(4)]
    check(edits, [1, 2, 7, 70], dtype, kernel_dir)


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.lists(st.tuples(st.frozensets(st.sampled_from(TERMS)), st.sampled_from((1, 1, 2, 3, 4, 20, 130))), max_size=8),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_programs_of_all_kinds_in_one_batch_equal_the_reference(
    chosen: list[tuple[frozenset[str], int]], dtype: torch.dtype, kernel_dir: Path
) -> None:
    chosen = [(frozenset({"low_rank"}), 1), *chosen]
    edits = [linear_edit(terms or frozenset({"shift"}), seed, dtype) for seed, (terms, _) in enumerate(chosen)]
    check(edits, [count for _, count in chosen], dtype, kernel_dir)


def test_a_row_that_is_not_finite_stays_alone(kernel_dir: Path) -> None:
    edits = [linear_edit(frozenset(TERMS), seed, torch.float32) for seed in range(3)]
    edits[1].down = torch.full((8, IN), 1e30)
    edits[1].up = torch.full((8, OUT), 1e30)
    bank, slots = make_bank(edits, torch.float32)
    x, base = torch.randn(12, IN), torch.randn(IN, OUT)
    x[2], x[7] = float("nan"), float("inf")
    runs = [(slots[0], 0, 4), (slots[1], 4, 6), (0, 6, 8), (slots[2], 8, 12)]
    found = outcome(bank, runs, native(kernel_dir, torch.float32), x, base)
    assert torch.isfinite(found).all(-1).tolist() == [row not in (2, 4, 5, 7) for row in range(12)]


def test_a_row_is_bit_for_bit_the_same_alone_and_packed(kernel_dir: Path) -> None:
    bank, slots = make_bank([linear_edit(frozenset(TERMS), seed, torch.float32) for seed in range(3)], torch.float32)
    x, z = torch.randn(50, IN), torch.randn(50, OUT)
    runs = [(slots[0], 0, 33), (0, 33, 40), (slots[1], 40, 43), (slots[2], 43, 50)]

    def result(runs: list[Run], start: int, end: int) -> tuple[Tensor, Tensor]:
        work = StepEdits(bank, runs, native(kernel_dir, torch.float32)).linear(SITE, IN, OUT)
        assert isinstance(work, NativeLinearWork)
        return work.before(x[start:end]), work.after(z[start:end].clone(), x[start:end])

    packed_rows = result(runs, 0, 50)
    for slot, start, end in runs:
        for row in range(start, end) if slot else ():
            for found, expected in zip(result([(slot, 0, 1)], row, row + 1), packed_rows, strict=True):
                assert torch.equal(found[0], expected[row])


def test_a_program_that_moved_is_read_where_it_lies(kernel_dir: Path) -> None:
    def low_rank(rank: int) -> LinearEdit:
        return LinearEdit(down=torch.randn(rank, IN), up=torch.randn(rank, OUT))

    # Room for 75 ranks. Three programs have 60 of them; the first goes, and neither its room nor the rest is enough for the next.
    rank_bytes = (IN + OUT) * 4
    bank, slots = make_bank([low_rank(15), low_rank(30), low_rank(15)], torch.float32, capacity_bytes=75 * rank_bytes)
    kernel = native(kernel_dir, torch.float32)
    cache, x, base = EditCache(bank, kernel=kernel), torch.randn(2, IN), torch.randn(IN, OUT)

    def cached() -> Tensor:
        step = cache.get([(slots[2], 0, 2)])
        assert step is not None
        work = step.linear(SITE, IN, OUT)
        assert isinstance(work, NativeLinearWork)
        return work.after(work.before(x) @ base, x)

    before, serial = cached(), bank.resident(slots[2]).serial
    bank.evict("0")
    assert bank.admit(packed(low_rank(30), "large")).resident is not None
    assert bank.resident(slots[2]).serial != serial
    assert torch.equal(cached(), before)


@pytest.mark.parametrize(
    ("field", "tensor"),
    [
        ("dense", torch.zeros(OUT, IN + 1)),
        ("dense", torch.zeros(OUT, IN, dtype=torch.float64)),
        ("rotation", torch.zeros(5, 4, 4)),
        ("rotation", torch.zeros(1, 7, 7)),
        ("left", torch.zeros(5, 4)),
    ],
)
def test_a_tensor_that_does_not_fit_is_never_read(field: str, tensor: Tensor, kernel_dir: Path) -> None:
    edit = LinearEdit(right=torch.zeros(8, 8)) if field == "left" else LinearEdit()
    setattr(edit, field, tensor)
    bank, slots = make_bank([edit], torch.float32)
    edits = StepEdits(bank, [(slots[0], 0, 1)], native(kernel_dir, torch.float32))
    with pytest.raises(ValueError, match=r"dense|rotation|left"):
        edits.linear(SITE, IN, OUT)
