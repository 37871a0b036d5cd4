"""The bank as a state machine: pins hold, budgets hold, what is resident is what was admitted."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.adapters.bank import Bank
from server.adapters.base_spec import BaseSpec, SiteSpec
from server.adapters.ir import LinearEdit, Program
from server.adapters.packed import PackedProgram, alignment, pack_program

SPEC = BaseSpec(
    family="llama",
    digest="",
    dtype="float32",
    hidden_size=6,
    vocab_size=11,
    num_layers=1,
    backbone_prefix="model.",
    tied_head=False,
    embedding="e",
    head="h",
    sites=(
        SiteSpec("a", "linear", 6, 4, False, 0),
        SiteSpec("b", "linear", 4, 6, False, 0),
        SiteSpec("h", "head", 6, 11, False, None),
    ),
)
NAMES = [f"p{index}" for index in range(6)]


def packed(name: str, rank: int) -> PackedProgram:
    generator = torch.Generator().manual_seed(hash(name) % 1000)
    program = Program()
    for site in SPEC.sites[:2]:
        down = torch.randn(rank, site.in_features, generator=generator)
        up = torch.randn(rank, site.out_features, generator=generator)
        program.add(site.name, LinearEdit(down=down, up=up, shift=torch.randn(site.out_features, generator=generator)))
    return pack_program(program, program_id=name)


CAPACITY = 1500


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_bank(clock: Callable[[], float] = time.monotonic, *, capacity: int = CAPACITY, slots: int = 4) -> Bank:
    device = torch.device("cpu")
    return Bank(SPEC, capacity_bytes=capacity, max_slots=slots, dtype=torch.float32, device=device, clock=clock)


class BankMachine(RuleBasedStateMachine):
    """Programs of different ranks come for two tenants, are used, pinned for ever, moved and evicted in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.bank = make_bank(self.clock)
        self.pins: dict[str, int] = {}
        self.ranks: dict[str, int] = {}
        self.kept: set[str] = set()
        self.gone: set[int] = set()
        self.bank.watch(self.gone.add)

    @rule(
        name=st.sampled_from(NAMES),
        rank=st.integers(1, 9),
        tenant=st.sampled_from("ab"),
        insists=st.booleans(),
        move_bytes=st.sampled_from([1, 10**9]),
    )
    def admit(self, name: str, rank: int, tenant: str, insists: bool, move_bytes: int) -> None:
        if self.bank.find(name) is not None:
            return
        program = packed(name, rank)
        admission = self.bank.admit(program, tenant, insists=insists, move_bytes=move_bytes)
        assert not set(admission.evicted) & (self.pins.keys() | self.kept)
        for gone in admission.evicted:
            del self.ranks[gone]
        if admission.resident is not None:
            self.ranks[name] = rank
            assert admission.resident.nbytes == self.bank.footprint(program)
        elif admission.is_moving:
            assert move_bytes == 1
            assert self.bank.used_bytes + self.bank.footprint(program) <= self.bank.capacity_bytes
        if not insists:
            self.bank.withdraw(name)

    @precondition(lambda self: self.ranks)
    @rule(data=st.data(), tenant=st.sampled_from("ab"))
    def pin(self, data: st.DataObject, tenant: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.ranks)))
        if self.bank.can_pin(name):
            assert self.bank.pin(name, tenant) == self.bank.find(name).slot  # type: ignore[union-attr]
            self.pins[name] = self.pins.get(name, 0) + 1

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.pins)))
        self.bank.unpin(name, "a")
        self.pins[name] -= 1
        if not self.pins[name]:
            del self.pins[name]

    @rule(name=st.sampled_from(NAMES), keeps=st.booleans())
    def keep(self, name: str, keeps: bool) -> None:
        if keeps and len(self.kept) < 2:
            self.kept.add(name)
            self.bank.keep(name)
        elif not keeps:
            self.kept.discard(name)
            self.bank.let_go(name)

    @rule(seconds=st.sampled_from([1.0, 20.0]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @precondition(lambda self: self.ranks)
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.ranks)))
        if name in self.pins:
            with pytest.raises(ValueError, match="in use"):
                self.bank.evict(name)
        else:
            self.bank.evict(name)
            del self.ranks[name]

    @invariant()
    def holds_what_was_admitted(self) -> None:
        assert self.bank.num_slots_used == len(self.ranks) <= 4
        assert self.bank.num_slots_pinned == len(self.pins.keys() | (self.kept & self.ranks.keys()))
        assert self.bank.used_bytes <= self.bank.capacity_bytes
        assert self.bank.used_bytes == sum(self.bank.footprint(packed(name, rank)) for name, rank in self.ranks.items())
        slots = set()
        for name, rank in self.ranks.items():
            resident = self.bank.find(name)
            assert resident is not None
            assert resident.serial not in self.gone
            assert self.bank.resident(resident.slot) is resident
            slots.add(resident.slot)
            expected = packed(name, rank)
            held = self.bank.rows[resident.rows_offset : resident.rows_offset + resident.num_rows]
            assert torch.equal(held, expected.rows)
            held = self.bank.vectors[resident.vectors_offset : resident.vectors_offset + resident.num_vectors]
            assert torch.equal(held, expected.vectors)
            down = expected.layouts["a"].down
            view = self.bank.row_view(6)
            assert view is not None
            assert torch.equal(view[(resident.rows_offset + down) // 6], expected.rows[down : down + 6])
        assert len(slots) == len(self.ranks)
        assert 0 not in slots


TestBankMachine = BankMachine.TestCase
TestBankMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_alignment_leaves_out_vocabularies() -> None:
    assert alignment(SPEC) == 12


def test_room_beside_explicit_pins() -> None:
    bank = make_bank()
    bank.admit(packed("p0", 2))
    bank.keep("p0")
    taken = bank.footprint(packed("p0", 2))
    assert (bank.permanent_bytes, bank.room_beside_pins("p1"), bank.room_beside_pins("p0")) == (taken, CAPACITY - taken, CAPACITY)
    assert bank.admit(packed("p1", 16)).resident is None
    bank.let_go("p0")
    assert bank.admit(packed("p1", 16)).evicted == ("p0",)


def test_room_in_pieces_is_pushed_together_and_nobody_evicted_for_it() -> None:
    """Six programs fill the bank, three that are no neighbours go, and one of almost thrice the size comes while the others are in use."""
    bank = make_bank(capacity=6 * make_bank().footprint(packed("p0", 9)), slots=6)
    for index in range(6):
        assert bank.admit(packed(f"p{index}", 9)).resident is not None
    used = ("p1", "p3", "p5")
    for name in used:
        bank.pin(name)
    for name in ("p0", "p2", "p4"):
        bank.evict(name)
    serials = [bank.find(name).serial for name in used]  # type: ignore[union-attr]
    first = bank.admit(packed("large", 27), move_bytes=1)
    assert (first.resident, first.evicted, first.is_moving) == (None, (), True)
    second = bank.admit(packed("large", 27))
    assert second.resident is not None
    assert second.evicted == ()
    moved = [bank.find(name) for name in used]
    assert [item.serial == serial for item, serial in zip(moved, serials, strict=True) if item] == [False, False, True]
    for name, item in zip(used, moved, strict=True):
        assert item is not None
        held = bank.rows[item.rows_offset : item.rows_offset + item.num_rows]
        assert torch.equal(held, packed(name, 9).rows)


def test_one_that_insists_is_served_though_the_bank_is_never_idle() -> None:
    """Two slots, both always in use by tenants within their shares: the third tenant's program comes once it insists."""
    bank = make_bank(slots=2)
    for name, tenant in (("p0", "a"), ("p1", "b")):
        bank.admit(packed(name, 1), tenant)
        bank.pin(name, tenant)
    assert bank.admit(packed("p2", 1), "c").resident is None
    assert bank.can_pin("p0")
    assert bank.can_pin("p1")
    assert bank.admit(packed("p2", 1), "c", insists=True).resident is None
    drained = [name for name in ("p0", "p1") if not bank.can_pin(name)]
    assert len(drained) == 1
    # Its own tenant's others wait behind it.
    assert bank.admit(packed("p3", 1), "c", insists=True).resident is None
    bank.unpin(drained[0], "a")
    assert bank.admit(packed("p2", 1), "c", insists=True).evicted == (drained[0],)
    assert bank.can_pin("p2")


def test_what_nobody_wants_any_more_drains_nothing() -> None:
    bank = make_bank(slots=1)
    bank.admit(packed("p0", 1), "a")
    bank.pin("p0", "a")
    bank.admit(packed("p1", 1), "b", insists=True)
    assert not bank.can_pin("p0")
    bank.withdraw("p2")
    assert not bank.can_pin("p0")
    bank.withdraw("p1")
    assert bank.can_pin("p0")
