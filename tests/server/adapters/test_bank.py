"""The bank as a state machine: pins hold, budgets hold, what is resident is what was admitted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.adapters.bank import Bank
from server.adapters.base_spec import BaseSpec, SiteSpec
from server.adapters.extents import Extents
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


class BankMachine(RuleBasedStateMachine):
    """Programs of different ranks come, are pinned, unpinned and evicted in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.bank = Bank(SPEC, capacity_bytes=1500, max_slots=4, dtype=torch.float32, device=torch.device("cpu"))
        self.pins: dict[str, int] = {}
        self.ranks: dict[str, int] = {}

    @rule(name=st.sampled_from(NAMES), rank=st.integers(1, 9))
    def admit(self, name: str, rank: int) -> None:
        if self.bank.find(name) is not None:
            return
        resident, evicted = self.bank.admit(packed(name, rank))
        assert not set(evicted) & self.pins.keys()
        for gone in evicted:
            del self.ranks[gone]
        if resident is not None:
            self.ranks[name] = rank
        else:
            assert self.pins, "without pins there is always room"

    @precondition(lambda self: self.ranks)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.ranks)))
        assert self.bank.pin(name) == self.bank.find(name).slot  # type: ignore[union-attr]
        self.pins[name] = self.pins.get(name, 0) + 1

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.pins)))
        self.bank.unpin(name)
        self.pins[name] -= 1
        if not self.pins[name]:
            del self.pins[name]

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
        assert self.bank.num_slots_pinned == len(self.pins)
        assert self.bank.used_bytes <= self.bank.capacity_bytes
        assert self.bank.used_bytes == sum(packed(name, rank).nbytes for name, rank in self.ranks.items())
        slots = set()
        for name, rank in self.ranks.items():
            resident = self.bank.find(name)
            assert resident is not None
            assert self.bank.resident(resident.slot) is resident
            slots.add(resident.slot)
            expected = packed(name, rank)
            held = self.bank.rows[resident.rows_offset : resident.rows_offset + resident.num_rows]
            assert torch.equal(held, expected.rows)
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


def test_a_program_larger_than_the_bank_never_fits() -> None:
    bank = Bank(SPEC, capacity_bytes=1500, max_slots=4, dtype=torch.float32, device=torch.device("cpu"))
    assert bank.fits(400)
    assert not bank.fits(1500)


def test_extents_merge_when_freed() -> None:
    extents = Extents(100, 10)
    starts = [extents.allocate(25) for _ in range(3)]
    assert starts == [0, 30, 60]
    assert extents.allocate(20) is None
    for start in (30, 0, 60):
        extents.release(start, 25)
    assert extents.allocate(100) == 0
