"""The scheduler as a state machine: budgets hold, everybody ends, nobody is starved, nothing is lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.block_manager import BlockManager
from server.engine.pacing import Pacing
from server.engine.scheduler import INPUT_PRICE, OUTPUT_PRICE, Schedule, Scheduler
from server.engine.sequence import Sequence, SequenceState
from server.engine.types import BASE, ProgramRef, Request, SamplingParams

BLOCK = 4


def make(
    request_id: str,
    prompt: int,
    tokens: int,
    tenant: str,
    order: int,
    prologue: tuple[int, int] = (0, 0),
    *,
    streams: bool = True,
) -> Sequence:
    """A sequence; with a prologue it has the program that is named after it."""
    params = SamplingParams(max_tokens=tokens)
    program = ProgramRef(f"{prologue}", "file") if any(prologue) else BASE
    sequence = Sequence(Request(request_id, tuple(range(5, 5 + prompt)), params, program, tenant, streams=streams), order)
    sequence.start_with(*prologue, sum(prologue))
    return sequence


class Simulation:
    """The engine's part around the scheduler: counts what was computed and appends a token where one is due.

    ``memory`` stands for the K/V: what was computed or copied at (block, offset), told by everything that it depends on.
    """

    def __init__(
        self, *, num_blocks: int, max_running: int, max_batch_tokens: int, slots: int = 100, pacing: Pacing | None = None
    ) -> None:
        self.blocks = BlockManager(num_blocks, BLOCK)
        self.slots = slots
        self.pinned: set[str] = set()
        self.budget, self.max_running = max_batch_tokens, max_running
        self.scheduler = Scheduler(
            self.blocks,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            pin=self._pin,
            unpin=self._unpin,
            pacing=pacing,
        )
        self.served: dict[str, int] = {}
        self.finished: list[str] = []
        self.memory: dict[tuple[int, int], object] = {}

    def _pin(self, sequence: Sequence) -> bool:
        if len(self.pinned) == self.slots:
            return False
        self.pinned.add(sequence.request.request_id)
        return True

    def _unpin(self, sequence: Sequence) -> None:
        self.pinned.remove(sequence.request.request_id)

    def step(self) -> Schedule:
        schedule = self.scheduler.schedule()
        self.memory = {place: held for place, held in self.memory.items() if place[0] not in schedule.new_blocks}
        assert schedule.num_tokens <= self.budget
        assert len(self.scheduler.running) <= self.max_running
        assert len({id(item.sequence) for item in schedule.items}) == len(schedule.items)
        assert self.pinned == {sequence.request.request_id for sequence in self.scheduler.running}
        for item in schedule.items:
            sequence = item.sequence
            assert item.count > 0
            assert item.start == sequence.num_computed >= sequence.num_prologue_kv
            assert len(sequence.block_table) * BLOCK >= item.start + item.count
            self._remember(sequence, item.copied(BLOCK))
            self._remember(sequence, range(item.start, item.start + item.count))
            assert all(self._held(sequence, index) == content(sequence, index) for index in range(item.start + item.count))
            sequence.num_computed += item.count
            hashes = sequence.full_block_hashes(BLOCK)
            for index in range(sequence.num_computed // BLOCK):
                self.blocks.register(sequence.block_table[index], hashes[index])
            if item.samples:
                sequence.token_ids.append(7)
                if sequence.num_output == sequence.request.params.max_tokens:
                    self.scheduler.remove(sequence)
                    self.finished.append(sequence.request.request_id)
        self.blocks.check_integrity()
        return schedule

    def _remember(self, sequence: Sequence, indices: range) -> None:
        for index in indices:
            self.memory[sequence.block_table[index // BLOCK], index % BLOCK] = content(sequence, index)

    def _held(self, sequence: Sequence, index: int) -> object:
        return self.memory[sequence.block_table[index // BLOCK], index % BLOCK]


def content(sequence: Sequence, index: int) -> object:
    """What the K/V at a kv index depends on."""
    return sequence.tenant, sequence.program.program_id, tuple(sequence.tokens_between(0, index + 1))


requests = st.lists(
    st.tuples(
        st.integers(1, 30),
        st.integers(1, 12),
        st.sampled_from("abc"),
        st.integers(0, 6),
        st.sampled_from([(0, 0), (5, 0), (4, 0), (0, 9), (7, 6)]),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=80)
@given(
    requests=requests,
    num_blocks=st.integers(16, 40),
    max_running=st.integers(1, 8),
    budget=st.integers(1, 40),
    slots=st.integers(1, 9),
)
def test_everything_ends_within_its_budgets(
    requests: list[tuple[int, int, str, int, tuple[int, int]]], num_blocks: int, max_running: int, budget: int, slots: int
) -> None:
    world = Simulation(num_blocks=num_blocks, max_running=max_running, max_batch_tokens=budget, slots=slots)
    waiting = [
        (start, make(str(index), prompt, tokens, tenant, index, prologue))
        for index, (prompt, tokens, tenant, start, prologue) in enumerate(requests)
    ]
    for step in range(3000):
        for start, sequence in waiting:
            if start == step:
                world.scheduler.add(sequence)
        if not world.step().items and step > 6:
            break
    assert sorted(world.finished) == sorted(str(index) for index in range(len(requests)))
    assert world.blocks.num_used == 0
    assert not world.scheduler.has_work


@settings(max_examples=40)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 8)), min_size=2, max_size=4),
    max_running=st.integers(1, 6),
)
def test_backlogged_tenants_are_served_within_the_fair_bound(lengths: list[tuple[int, int]], max_running: int) -> None:
    """Sheng et al. 2024, theorem 4.4: the gap in service of two backlogged tenants is at most 2 max(w_p L_in, w_q M)."""
    world = Simulation(num_blocks=200, max_running=max_running, max_batch_tokens=40)
    order = 0
    for tenant, (prompt, tokens) in enumerate(lengths):
        for _ in range(60):
            order += 1
            world.scheduler.add(make(f"{tenant}-{order}", prompt + order % 3, tokens, str(tenant), order))
    longest = max(prompt for prompt, _ in lengths) + 2
    bound = 2 * max(INPUT_PRICE * longest, OUTPUT_PRICE * max_running * max(tokens for _, tokens in lengths))
    for _ in range(60):
        world.step()
        queue = world.scheduler._waiting
        backlogged = [served for tenant, served in queue._served.items() if tenant in queue._waiting]
        if len(backlogged) > 1:
            assert max(backlogged) - min(backlogged) <= bound


def test_decodes_come_before_long_prompts() -> None:
    world = Simulation(num_blocks=200, max_running=8, max_batch_tokens=8)
    world.scheduler.add(make("short", 2, 50, "a", 1))
    world.step()
    world.scheduler.add(make("long", 100, 1, "b", 2))
    for _ in range(5):
        schedule = world.step()
        assert [item.count for item in schedule.items] == [1, 7]


def test_prompts_are_paced_while_a_reader_waits_for_a_token() -> None:
    pacing = Pacing(1.0, smallest=BLOCK, largest=64)
    pacing.observe(64, 6.4)  # ten tokens a second are wanted
    for streams, counts in ((True, [9, 9, 9, 9, 4]), (False, [40])):
        world = Simulation(num_blocks=200, max_running=8, max_batch_tokens=64, pacing=pacing)
        world.scheduler.add(make("reader", 2, 50, "a", 1, streams=streams))
        world.step()
        world.scheduler.add(make("long", 40, 1, "b", 2))
        assert [[item.count for item in world.step().items][1:] for _ in counts] == [[count] for count in counts]


def test_without_a_decode_prompts_have_the_whole_budget() -> None:
    pacing = Pacing(1.0, smallest=BLOCK, largest=64)
    pacing.observe(64, 6.4)
    world = Simulation(num_blocks=200, max_running=8, max_batch_tokens=64, pacing=pacing)
    for order in range(3):
        world.scheduler.add(make(str(order), 20, 5, "a", order))
    assert [item.count for item in world.step().items] == [20, 20, 20]


@settings(max_examples=40, deadline=None)
@given(requests=requests, budget=st.integers(1, 40), token_s=st.floats(0.001, 1.0))
def test_everything_ends_however_slow_the_machine(
    requests: list[tuple[int, int, str, int, tuple[int, int]]], budget: int, token_s: float
) -> None:
    pacing = Pacing(0.1, smallest=BLOCK, largest=budget)
    world = Simulation(num_blocks=40, max_running=8, max_batch_tokens=budget, pacing=pacing)
    for index, (prompt, tokens, tenant, _, prologue) in enumerate(requests):
        world.scheduler.add(make(str(index), prompt, tokens, tenant, index, prologue))
    for _ in range(3000):
        schedule = world.step()
        if not schedule.items:
            break
        pacing.observe(schedule.num_tokens, schedule.num_tokens * token_s)
    assert sorted(world.finished) == sorted(str(index) for index in range(len(requests)))


def test_a_sequence_that_cannot_be_pinned_does_not_block_others() -> None:
    world = Simulation(num_blocks=200, max_running=8, max_batch_tokens=64)
    first, second = make("cannot", 4, 2, "a", 1), make("can", 4, 2, "b", 2)
    original = world._pin
    world.scheduler._pin = lambda sequence: sequence is not first and original(sequence)
    world.scheduler.add(first)
    world.scheduler.add(second)
    assert [item.sequence for item in world.step().items] == [second]
    assert first.state is SequenceState.WAITING


def test_idle_tenants_earn_no_credit() -> None:
    world = Simulation(num_blocks=400, max_running=1, max_batch_tokens=64)
    for index in range(20):
        world.scheduler.add(make(f"busy-{index}", 10, 4, "busy", index))
    for _ in range(30):
        world.step()
    world.scheduler.add(make("late", 10, 4, "late", 99))
    assert world.scheduler._waiting._served["late"] == world.scheduler._waiting._served["busy"]
