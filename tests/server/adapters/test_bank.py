"""The bank as a state machine: pins hold, budgets hold, what is resident is what was admitted."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from server.adapters.arena import Arena
from server.adapters.bank import Admission, Bank
from server.adapters.base_spec import SiteSpec
from server.adapters.ir import LinearEdit, Program
from server.adapters.packed import PackedProgram, alignment, pack_program
from server.adapters.pending_copies import CopyStream
from tests.held_copies import HeldCopies
from tests.server.adapters.conftest import small_spec

SPEC = small_spec(
    6,
    SiteSpec("a", "linear", 6, 4, False, 0),
    SiteSpec("b", "linear", 4, 6, False, 0),
    SiteSpec("h", "head", 6, 11, False, None),
)
NAMES = [f"p{index}" for index in range(4)] + ["exact0", "exact1", "exact2"]


def packed(name: str, rank: int) -> PackedProgram:
    """A program; with matrices that bf16 holds exactly where it is named so."""
    matrix_dtype = torch.bfloat16 if name.startswith("exact") else torch.float32
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    program = Program()
    for site in SPEC.sites[:2]:
        down, up = (
            torch.randn(rank, width, generator=generator).to(matrix_dtype).float()
            for width in (site.in_features, site.out_features)
        )
        program.add(site.name, LinearEdit(down=down, up=up, shift=torch.randn(site.out_features, generator=generator)))
    return pack_program(program, program_id=name)


CAPACITY = 1500


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make_bank(
    clock: Callable[[], float] = time.monotonic,
    *,
    capacity: int = CAPACITY,
    slots: int = 4,
    keeps_bf16: bool = False,
    copy_stream: CopyStream | None = None,
) -> Bank:
    return Bank(
        SPEC,
        capacity_bytes=capacity,
        max_slots=slots,
        dtype=torch.float32,
        device=torch.device("cpu"),
        keeps_bf16=keeps_bf16,
        copy_stream=copy_stream,
        clock=clock,
    )


class BankMachine(RuleBasedStateMachine):
    """Programs of different ranks, also in bf16, come for two tenants, are used, pinned for ever, moved and evicted in any order."""

    keeps_bf16 = False
    copy_stream: HeldCopies | None = None

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.bank = make_bank(self.clock, keeps_bf16=self.keeps_bf16, copy_stream=self.copy_stream)
        self.pins: dict[str, list[str]] = {}
        self.ranks: dict[str, int] = {}
        self.kept: set[str] = set()
        self.gone: set[int] = set()
        self.bank.watch(self.gone.add)

    @rule(
        name=st.sampled_from(NAMES),
        rank=st.integers(1, 9),
        tenant=st.sampled_from("ab"),
        insists=st.booleans(),
        copy_bytes=st.sampled_from([1, 600, 10**9]),
    )
    def admit(self, name: str, rank: int, tenant: str, insists: bool, copy_bytes: int) -> None:
        if self.bank.find(name) is not None:
            return
        program = packed(name, rank)
        copied = self.bank.copies.total
        pending = {held for held in self.ranks if not self.has_arrived(held)}
        self.bank.begin_step(copy_bytes)
        admission = self.bank.admit(program, tenant, insists=insists)
        copied = self.bank.copies.total - copied
        assert not set(admission.evicted) & (self.pins.keys() | self.kept | pending)
        for gone in admission.evicted:
            del self.ranks[gone]
        if admission.resident is not None:
            self.ranks[name] = rank
            assert admission.resident.nbytes == self.bank.footprint(program)
        elif admission.is_deferred:
            assert copied
            assert self.bank.used_bytes + self.bank.footprint(program) <= self.bank.capacity_bytes
        largest = max([self.bank.footprint(packed(name, rank)) for name, rank in self.ranks.items()], default=0)
        assert copied <= max(copy_bytes, largest)
        if not insists:
            self.bank.withdraw(name)

    @precondition(lambda self: self.ranks)
    @rule(data=st.data(), tenant=st.sampled_from("ab"), again=st.booleans())
    def pin(self, data: st.DataObject, tenant: str, again: bool) -> None:
        name = data.draw(st.sampled_from(sorted(self.ranks)))
        if self.bank.can_pin(name):
            assert self.bank.pin(name, tenant, again=again) == self.bank.find(name).slot  # type: ignore[union-attr]
            self.pins.setdefault(name, []).append(tenant)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.pins)))
        self.bank.unpin(name, self.pins[name].pop(data.draw(st.integers(0, len(self.pins[name]) - 1))))
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

    def has_arrived(self, name: str) -> bool:
        """Whether the bank has been told that a program is all there."""
        return not self.bank._pending.is_pending(name)

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
            if not self.has_arrived(name):
                assert not self.bank.can_pin(name)
                continue
            expected = packed(name, rank)
            assert resident.rows_dtype is (expected.rows.dtype if self.keeps_bf16 else torch.float32)
            held = self.bank.rows[resident.rows_offset : resident.rows_offset + resident.num_rows].view(resident.rows_dtype)
            assert torch.equal(held, expected.rows.to(resident.rows_dtype))
            down = expected.layouts["a"].down
            matrix = expected.rows[down : down + rank * 6].view(rank, 6).float()
            assert torch.equal(self.bank.matrix(resident, down, rank, 6), matrix)
            held = self.bank.vectors[resident.vectors_offset : resident.vectors_offset + resident.num_vectors]
            assert torch.equal(held, expected.vectors)
            view = self.bank.row_view(6)
            assert view is not None
            if resident.rows_dtype is torch.float32:
                assert torch.equal(view[(resident.rows_offset + down) // 6], matrix[0])
        assert len(slots) == len(self.ranks)
        assert 0 not in slots
        ends = [0]
        for resident in sorted(map(self.bank.find, self.ranks), key=lambda item: item.start):  # type: ignore[union-attr]
            assert resident is not None
            assert resident.start >= ends[-1]
            assert resident.start == resident.rows_offset * self.bank.rows.itemsize
            assert resident.vectors_offset * self.bank.vectors.itemsize % 64 == 0
            rows_end = resident.start + resident.num_rows * self.bank.rows.itemsize
            assert rows_end <= resident.vectors_offset * self.bank.vectors.itemsize
            ends.append(resident.start + resident.length)
            assert (resident.vectors_offset + resident.num_vectors) * self.bank.vectors.itemsize <= ends[-1]


class Bf16BankMachine(BankMachine):
    """The same where matrices in bf16 stay so."""

    keeps_bf16 = True


class CopyingBankMachine(Bf16BankMachine):
    """The same where copies run beside the steps: programs go, move and are pinned for ever before they have arrived."""

    def __init__(self) -> None:
        self.copy_stream = HeldCopies()
        super().__init__()

    @rule(count=st.integers(1, 3), begins=st.booleans())
    def finish(self, count: int, begins: bool) -> None:
        assert self.copy_stream is not None
        self.copy_stream.finish(count)
        if begins:
            self.bank.begin_step(1)

    def teardown(self) -> None:
        assert self.copy_stream is not None
        self.copy_stream.finish()
        self.bank.begin_step(1)
        assert all(self.has_arrived(name) for name in self.ranks)
        self.holds_what_was_admitted()
        self.bank.begin_step(1)
        assert not self.bank.is_copying


TestBankMachine = BankMachine.TestCase
TestBf16BankMachine = Bf16BankMachine.TestCase
TestCopyingBankMachine = CopyingBankMachine.TestCase
TestBankMachine.settings = TestBf16BankMachine.settings = TestCopyingBankMachine.settings = settings(
    max_examples=40, stateful_step_count=30
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rows_and_vectors_are_the_same_bytes(dtype: torch.dtype) -> None:
    """One budget is one allocation, as many whole units of 12 numbers that end at a multiple of 64 bytes as fit into it."""
    bank = Bank(SPEC, capacity_bytes=CAPACITY, max_slots=4, dtype=dtype, device=torch.device("cpu"))
    assert bank.rows.data_ptr() == bank.vectors.data_ptr()
    assert bank.rows.nbytes == bank.vectors.nbytes == CAPACITY // (unit := math.lcm(12 * dtype.itemsize, 64)) * unit
    assert bank.vectors.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)


def test_matrices_in_bf16_take_half_the_room_where_they_stay_so() -> None:
    """960 or 480 bytes of matrices, up to a multiple of 64; 48 of vectors; and all of it in units of 192."""
    wide, exact = packed("p0", 12), packed("exact0", 12)
    assert (wide.rows.nbytes, exact.rows.nbytes, wide.vectors.nbytes) == (960, 480, 48)
    footprints = [make_bank(keeps_bf16=keeps).footprint(item) for keeps in (False, True) for item in (wide, exact)]
    assert footprints == [1152, 1152, 1152, 576]


def test_a_program_of_loose_tensors_takes_nothing_of_the_arena() -> None:
    """It lies where another one does, and does not move with it."""
    program = Program()
    program.add("a", LinearEdit(dense=torch.randn(4, 6)))
    loose, programs = pack_program(program, program_id="loose"), [packed(f"p{index}", 9) for index in range(3)]
    taken = make_bank().footprint(programs[0])
    bank = make_bank(capacity=3 * taken + 96)
    for item in (loose, *programs):
        assert bank.admit(item).evicted == ()
    before = bank.find("loose")
    assert before is not None
    assert (before.length, before.nbytes, bank.used_bytes) == (0, 96, bank.capacity_bytes)
    for name in ("p0", "p2"):
        bank.evict(name)
    assert bank.admit(packed("wide", 18)).evicted == ()
    moved = bank.find("p1")
    assert moved is not None
    assert moved.start == 0
    assert bank.find("loose") is before
    bank.evict("loose")
    assert bank.used_bytes == taken + bank.footprint(packed("wide", 18))


def test_alignment_leaves_out_vocabularies() -> None:
    assert alignment(SPEC) == 12


def test_room_beside_explicit_pins() -> None:
    bank = make_bank()
    bank.admit(packed("p0", 2))
    bank.keep("p0")
    taken = bank.footprint(packed("p0", 2))
    assert (bank.permanent_bytes, bank.room_beside_pins("p1"), bank.room_beside_pins("p0")) == (taken, CAPACITY - taken, CAPACITY)
    assert bank.admit(packed("p1", 15)).resident is None
    bank.let_go("p0")
    assert bank.admit(packed("p1", 15)).evicted == ("p0",)


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
    for _ in range(2):
        # One of the two that must move a step, and none of what would be too much beside it.
        bank.copies.begin(1)
        attempt = bank.admit(packed("large", 27))
        assert (attempt.resident, attempt.evicted, attempt.is_deferred) == (None, (), True)
    bank.copies.begin(1)
    last = bank.admit(packed("large", 27))
    assert last.resident is not None
    assert last.evicted == ()
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


def test_one_that_insists_is_served_though_others_never_stop_coming() -> None:
    """It wants most of the bank, and a tenant within its share starts a long generation on a new program before the last one has ended."""
    clock = Clock()
    bank = make_bank(clock, capacity=8 * make_bank().footprint(packed("p", 4)), slots=64)
    wide = packed("wide", 40)
    assert bank.capacity_bytes * 0.7 < bank.footprint(wide) < bank.capacity_bytes
    running: dict[str, float] = {}
    since = clock.now
    while bank.admit(wide, "c", insists=clock.now - since >= 10).resident is None:
        clock.now += 1
        for name in [name for name, end in running.items() if end <= clock.now]:
            bank.unpin(name, "a")
            del running[name]
        name = f"new-{clock.now}"
        if clock.now % 12 == 0 and bank.admit(packed(name, 4), "a").resident is not None:
            bank.pin(name, "a")
            running[name] = clock.now + 25
        assert len(bank._claim.draining if bank._claim else ()) <= bank.num_slots_used
        assert clock.now < 100, "it was never served"


@pytest.mark.parametrize("failing", [(Bank, "_install"), (Arena, "_copy_down")])
def test_what_the_device_cannot_do_leaves_nothing(failing: tuple[type, str], monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(capacity=3 * make_bank().footprint(packed("p0", 9)))
    for index in range(3):
        bank.admit(packed(f"p{index}", 9))
        bank.pin(f"p{index}")
    for name in ("p0", "p2"):
        bank.unpin(name)
        bank.evict(name)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("there is no memory")

    large = packed("large", 18)
    with monkeypatch.context() as patch:
        patch.setattr(*failing, fail)
        attempt = bank.admit(large)
    assert isinstance(attempt.error, torch.OutOfMemoryError)
    assert (attempt.resident, bank.num_slots_used) == (None, 1)
    assert bank.used_bytes == bank.footprint(packed("p1", 9))
    admitted, kept = bank.admit(large).resident, bank.find("p1")
    assert admitted is not None
    assert kept is not None
    for item, program in ((admitted, large), (kept, packed("p1", 9))):
        assert torch.equal(bank.rows[item.rows_offset : item.rows_offset + item.num_rows], program.rows)


def test_what_is_being_copied_is_not_evicted_before_it_could_be_used() -> None:
    """One slot and two programs that want it: the first one has a step for itself, whoever is asked for first in it."""
    copies = HeldCopies()
    bank = make_bank(slots=1, copy_stream=copies)
    first = bank.admit(packed("first", 1), "a")
    assert first.resident is not None
    assert not bank.can_pin("first")
    for _ in range(2):
        bank.begin_step(10**9)
        assert bank.admit(packed("second", 1), "b") == Admission()
    copies.finish()
    assert not bank.can_pin("first")
    bank.begin_step(10**9)
    assert bank.can_pin("first")
    assert bank.admit(packed("second", 1), "b") == Admission()
    assert bank.is_copying
    bank.begin_step(10**9)
    assert not bank.is_copying
    assert bank.admit(packed("second", 1), "b").evicted == ("first",)


def test_one_that_insists_drains_what_is_being_copied_after_a_step_of_its_own() -> None:
    copies = HeldCopies()
    bank = make_bank(slots=1, copy_stream=copies)
    bank.admit(packed("first", 1), "a")
    assert bank.admit(packed("second", 1), "b", insists=True) == Admission()
    copies.finish()
    for is_first_step in (True, False):
        bank.begin_step(10**9)
        assert bank.can_pin("first") == is_first_step
    assert bank.admit(packed("second", 1), "b").evicted == ("first",)


def test_what_goes_or_moves_before_it_has_arrived_spoils_nothing() -> None:
    """The first of three goes and the others are pushed down before anything has been copied; a fourth lies where they were."""
    copies, wide, taken = HeldCopies(), packed("wide", 18), make_bank().footprint(packed("p0", 9))
    bank = make_bank(capacity=2 * taken + make_bank().footprint(wide), copy_stream=copies)
    assert taken < bank.capacity_bytes - 2 * taken < 2 * taken
    for index in range(3):
        bank.admit(packed(f"p{index}", 9))
    bank.evict("p0")
    assert bank.admit(wide).resident is not None
    assert [item.start for name in ("p1", "p2", "wide") if (item := bank.find(name))] == [0, taken, 2 * taken]
    copies.finish()
    bank.begin_step(10**9)
    for name, program in (("p1", packed("p1", 9)), ("p2", packed("p2", 9)), ("wide", wide)):
        assert bank.can_pin(name)
        item = bank.find(name)
        assert item is not None
        assert torch.equal(bank.rows[item.rows_offset : item.rows_offset + item.num_rows], program.rows)


def test_no_copy_outlives_the_bank() -> None:
    copies = HeldCopies()
    bank = make_bank(copy_stream=copies)
    item = bank.admit(packed("p0", 9)).resident
    assert item is not None
    bank.close()
    assert torch.equal(bank.rows[item.rows_offset : item.rows_offset + item.num_rows], packed("p0", 9).rows)
    assert not bank.is_copying


def test_a_sequence_that_runs_again_is_no_new_use() -> None:
    """Of two that are worth the same, the one goes that was asked for once, though it was preempted often."""
    bank = make_bank(slots=2)
    for name, uses, again in (("twice", 2, 0), ("once", 1, 9)):
        bank.admit(packed(name, 2), "a")
        for number in range(uses + again):
            bank.pin(name, "a", again=number >= uses)
            bank.unpin(name, "a")
    assert bank.admit(packed("p2", 2), "a").evicted == ("once",)
