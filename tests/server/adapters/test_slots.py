"""Edits by slot are those by runs of rows: every term alone and all together, at linears and at sub-layers; a table follows its programs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.adapters.apply import EditCache, StepEdits
from server.adapters.bank import Bank
from server.adapters.ir import BottleneckEdit, LinearEdit, Placement, Program
from server.adapters.kernels import SlotKernels
from server.adapters.kernels.slots import REFERENCE
from server.adapters.kernels.triton_slots import TRITON
from server.adapters.packed import pack_program
from server.adapters.slot_bottleneck import SlotGroup
from server.adapters.slot_linear import SlotLinearWork
from tests.server.adapters.test_bottleneck import check_packed, programs
from tests.server.adapters.test_native_linear import IN, OUT, SITE, SPEC, TERMS, linear_edit, make_bank, outcome, packed

# The interpreter computes with NumPy, which warns of what is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
BY_SLOT = ("low_rank", "in_scale", "out_scale", "shift", "pairs")
"""Terms that have a place in the table."""


def check(kernels: SlotKernels, chosen: list[tuple[frozenset[str], int]], tolerance: float, dtype: torch.dtype) -> None:
    """Programs with some terms each, and how many rows each owns, with a row of the base before each."""
    edits = [linear_edit(terms or frozenset({"shift"}), seed, dtype) for seed, (terms, _) in enumerate(chosen)]
    bank, slots = make_bank(edits, dtype)
    runs, row = [], 0
    for slot, (_, count) in zip(slots, chosen, strict=True):
        runs += [(0, row, row + 1), (slot, row + 1, row + 1 + count)]
        row += 1 + count
    x, base = torch.randn(row, IN, dtype=dtype), torch.randn(IN, OUT, dtype=dtype)
    step = StepEdits(bank, runs, kernels)
    work = step.linear(SITE, IN, OUT)
    assert isinstance(work, SlotLinearWork)
    assert step.slots is not None
    assert step.slots.is_whole == all(terms <= set(BY_SLOT) for terms, _ in chosen)
    found = work.after(work.before(x) @ base, x)
    torch.testing.assert_close(found, outcome(bank, runs, None, x, base), rtol=tolerance, atol=tolerance)


batches = st.lists(st.tuples(st.frozensets(st.sampled_from(TERMS)), st.sampled_from((1, 2, 20))), min_size=1, max_size=6)


@settings(max_examples=40)
@given(chosen=batches)
def test_linears_by_slot_are_linears_by_runs(chosen: list[tuple[frozenset[str], int]]) -> None:
    check(REFERENCE, chosen, 1e-9, torch.float64)


@pytest.mark.parametrize("terms", [*((term,) for term in BY_SLOT), TERMS], ids="-".join)
def test_the_triton_kernels_at_a_linear(terms: tuple[str, ...]) -> None:
    check(TRITON, [(frozenset(terms), count) for count in (1, 2, 17)], 1e-4, torch.float32)


@settings(max_examples=40)
@given(batch=programs())
def test_bottlenecks_by_slot_are_the_reference_of_each(batch: list[tuple[list[BottleneckEdit], int]]) -> None:
    work = check_packed(REFERENCE, batch, torch.float64, tolerance=1e-9)
    plain = [
        items[0]
        for items, _ in batch
        if len(items) == 1
        and items[0].placement.is_plain
        and items[0].weight == 1.0
        and items[0].before_weight is None
        and items[0].after_weight is None
    ]
    kinds = {(item.placement.activation, item.placement.source) for item in plain}
    assert len(kinds) == sum(isinstance(group, SlotGroup) for group in (work.groups if work else ()))


def test_a_program_that_moved_or_took_anothers_slot_is_read_where_it_lies() -> None:
    def low_rank(rank: int) -> LinearEdit:
        return LinearEdit(down=torch.randn(rank, IN), up=torch.randn(rank, OUT))

    # Room for 75 ranks. Three programs have 60 of them; the first goes, and neither its room nor the rest is enough for the next.
    bank, slots = make_bank([low_rank(15), low_rank(30), low_rank(15)], torch.float32, capacity_bytes=75 * (IN + OUT) * 4)
    cache, x, base = EditCache(bank, kernel=REFERENCE), torch.randn(2, IN), torch.randn(IN, OUT)

    def cached(slot: int) -> torch.Tensor:
        step = cache.get([(slot, 0, 2)])
        assert step is not None
        work = step.linear(SITE, IN, OUT)
        assert isinstance(work, SlotLinearWork)
        return work.after(work.before(x) @ base, x)

    cached(slots[0])
    before, serial = cached(slots[2]), bank.resident(slots[2]).serial
    bank.evict("0")
    newcomer = low_rank(28)
    resident = bank.admit(packed(newcomer, "new")).resident
    assert resident is not None
    assert resident.slot == slots[0]
    assert bank.resident(slots[2]).serial != serial
    assert torch.equal(cached(slots[2]), before)
    assert newcomer.down is not None
    assert newcomer.up is not None
    torch.testing.assert_close(cached(slots[0]), x @ base + x @ newcomer.down.T @ newcomer.up, rtol=1e-5, atol=1e-4)


def test_lasting_edits_follow_the_slots_that_are_filled_in() -> None:
    edits = [linear_edit(frozenset({"low_rank", "out_scale"}), seed, torch.float64) for seed in range(3)]
    bank, slots = make_bank(edits, torch.float64)
    cache, places = EditCache(bank, kernel=REFERENCE), torch.zeros(3, dtype=torch.int32)
    x, base = torch.randn(3, IN, dtype=torch.float64), torch.randn(IN, OUT, dtype=torch.float64)
    work = cache.lasting([(slots[0], 0, 1), (0, 1, 3)], places).linear(SITE, IN, OUT)
    assert work is not None
    for runs in ([(slots[2], 0, 1), (slots[1], 1, 3)], [(0, 0, 2), (slots[0], 2, 3)]):
        step = cache.get(runs)
        assert step is not None
        assert step.slots is not None
        places.copy_(step.slots.slots)
        found = work.after(work.before(x) @ base, x)
        torch.testing.assert_close(found, outcome(bank, runs, None, x, base))


def test_steps_are_alike_whose_programs_have_the_same_terms() -> None:
    kinds = [frozenset({"low_rank"}), frozenset({"low_rank"}), frozenset({"low_rank", "shift"}), frozenset({"dense"})]
    # Ranks are 1 + seed % 7.
    bank, slots = make_bank(
        [linear_edit(terms, seed, torch.float64) for terms, seed in zip(kinds, (4, 6, 6, 0), strict=True)], torch.float64
    )
    steps = [StepEdits(bank, [(slot, 0, 1)], REFERENCE).slots for slot in slots]
    found = [(step.terms, step.rank, step.is_whole) for step in steps if step is not None]
    assert found[0] == found[1] == (frozenset({(SITE, "low_rank")}), 8, True)
    assert found[2][0] > found[0][0]
    assert found[3] == (frozenset(), 0, False)


def test_a_bottleneck_beside_low_rank_terms_of_the_same_linear() -> None:
    program = Program()
    program.add(SITE, LinearEdit(down=torch.randn(2, IN), up=torch.randn(2, OUT)))
    program.add(SITE, BottleneckEdit(Placement("relu"), torch.randn(3, IN), torch.randn(3, IN)))
    bank = Bank(SPEC, capacity_bytes=1 << 20, max_slots=2, dtype=torch.float32, device=torch.device("cpu"))
    resident = bank.admit(pack_program(program, program_id="p")).resident
    assert resident is not None
    step = StepEdits(bank, [(resident.slot, 0, 1)], REFERENCE).slots
    assert step is not None
    assert step.terms == {(SITE, "low_rank"), (f"{SITE} bottleneck", "relu of sublayer")}
    assert (step.rank, step.inner, step.is_whole) == (2, 4, True)
