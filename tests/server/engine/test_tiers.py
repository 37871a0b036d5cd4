"""Who gets room and copies, and when: nobody waits for ever, nothing that was asked for ahead goes first, and what fails fails alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.adapters.bank import Bank
from server.adapters.eviction import WINDOW_S
from server.engine import programs, tiers
from server.engine.engine import Engine
from server.engine.load_queue import LoadQueue, WaitingLoad
from server.engine.types import ProgramRef
from tests.harness import greedy, make_engine, run
from tests.server.engine.stepping import Clock, Make, finish, settle, states, wait_for_loads

PROMPT = [9, 200, 31, 77]


def file_bytes(ref: ProgramRef) -> int:
    return Path(ref.path).stat().st_size


def footprint(engine: Engine, ref: ProgramRef) -> int:
    """What a program that is in the host takes on the device."""
    program = engine.host.get(ref.program_id)
    assert program is not None
    return engine.bank.footprint(program)


def test_tenants_take_turns_and_one_program_is_loaded_once() -> None:
    queue = LoadQueue()
    for tenant, name in ("aa", "ab", "ac", "bc", "bd"):
        queue.add(WaitingLoad(ProgramRef(name), tenant, 1, 0.0))
    started = []
    while waiting := queue.next_ones():
        started.append(waiting[0].ref.program_id)
        queue.started(waiting[0])
    assert started == ["a", "c", "b", "d"]
    assert len(queue) == 0


def test_a_load_that_gets_no_room_holds_up_nobody_and_comes_in_time(model: Path, make: Make) -> None:
    """A host tier of one large program and a small one; two tenants use a small one each, again and again, within their shares."""
    clock = Clock()
    large, small = make("large", 12), [make(f"small-{name}", 1) for name in "abd"]
    engine = make_engine(model, host_bytes=file_bytes(large) + file_bytes(small[0]), max_slots=2, clock=clock)
    for tenant, ref in zip("ab", small, strict=False):
        run(engine, [greedy(tenant, PROMPT, ref, tokens=1, tenant=tenant)])
    engine.add(greedy("c", PROMPT, large, tokens=1, tenant="c"))
    engine.add(greedy("d", PROMPT, small[2], tokens=1, tenant="d"))
    ended: dict[str, float] = {}
    began = clock.now
    while "c" not in ended:
        assert clock.now < began + 3 * WINDOW_S, "it is never served"
        for tenant, ref in zip("ab", small, strict=False):
            engine.add(greedy(f"{tenant}{clock.now}", PROMPT, ref, tokens=1, tenant=tenant))
        for _ in range(4):
            wait_for_loads(engine)
            for output in engine.step():
                if output.finish_reason is not None:
                    assert output.error is None
                    ended[output.request_id] = clock.now
        clock.now += 1
    assert ended["d"] <= began + 2
    finish(engine, lambda: setattr(clock, "now", clock.now + 1))


def test_one_load_does_not_wait_for_all_of_another_tenants(model: Path, make: Make) -> None:
    refs = [make(f"queued-{index}", 1) for index in range(20)]
    engine = make_engine(model, host_bytes=4 * file_bytes(refs[0]) + 64, max_slots=2, max_running=2)
    for index, ref in enumerate(refs[:-1]):
        engine.add(greedy(f"a{index}", PROMPT, ref, tokens=1, tenant="a"))
    engine.add(greedy("b", PROMPT, refs[-1], tokens=1, tenant="b"))
    ended: list[str] = []
    while "b" not in ended:
        wait_for_loads(engine)
        ended += [output.request_id for output in engine.step() if output.finish_reason]
    assert len(ended) <= 8
    assert len(finish(engine)) == 20 - len(ended)


def test_requests_come_before_prefetches(model: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody prefetches more in every step than a step can copy, in turns, so that there is always something to bring."""
    monkeypatch.setattr(tiers, "COPY_BYTES_PER_STEP", 1)
    engine = make_engine(model, max_slots=3)
    wanted, ahead = make("wanted", 2), [make(f"ahead-{index}", 2) for index in range(4)]
    for ref in (wanted, *ahead):
        engine.load_program(ref)
        settle(engine)
    if engine.bank.find("wanted"):
        engine.bank.evict("wanted")
    engine.add(greedy("x", PROMPT, wanted, tokens=1))
    for ref in ahead:
        engine.load_program(ref)
    assert [output.request_id for output in engine.step()] == ["x"]


def test_prefetches_are_bounded_and_leave_the_loader_to_requests(
    model: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "MAX_PREFETCHES", 3)
    engine = make_engine(model)
    ahead = [make(f"bounded-{index}", 1) for index in range(6)]
    for ref in ahead:
        engine.load_program(ref)
    engine.step()
    assert engine.stats().counters["loads"] == 2
    settle(engine, 6)
    assert [engine.bank.find(ref.program_id) is not None for ref in ahead] == [False] * 3 + [True] * 3


def test_a_prefetch_without_room_ends_and_the_engine_sleeps(model: Path, make: Make) -> None:
    kept, wide = make("kept", 8), make("wide-one", 12)
    engine = make_engine(model)
    run(engine, [greedy("x", PROMPT, kept, tokens=1)])
    engine = make_engine(model, bank_bytes=2 * footprint(engine, kept))
    engine.pin_program(kept)
    settle(engine)
    engine.load_program(wide)
    assert states(settle(engine), "wide-one") == ["loading", "host"]
    engine.step()
    assert not engine.has_runnable
    assert not engine._programs._prefetches


def test_an_engine_whose_requests_all_wait_for_room_sleeps(model: Path, make: Make) -> None:
    """A tenant uses the only slot, and it is its own; another one's request waits, and the engine does not spin meanwhile."""
    clock = Clock()
    engine = make_engine(model, max_slots=1, clock=clock)
    mine, other = make("mine-alone", 1), make("other", 1)
    run(engine, [greedy("x", PROMPT, mine, tokens=1, tenant="a")])
    engine.add(greedy("y", PROMPT, other, tokens=1, tenant="b"))
    engine.bank.keep("mine-alone")
    settle(engine)
    assert engine.has_unfinished
    assert not engine.has_runnable
    engine.bank.let_go("mine-alone")
    clock.now += WINDOW_S
    assert set(finish(engine)) == {"y"}


def test_what_did_not_fit_into_a_step_is_copied_in_the_next(model: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing runs: the engine does not sleep over it."""
    monkeypatch.setattr(tiers, "COPY_BYTES_PER_STEP", 1)
    engine = make_engine(model)
    for name in ("one", "two", "three"):
        engine.load_program(make(name, 1))
    steps = 0
    while engine.bank.num_slots_used < 3:
        wait_for_loads(engine)
        engine.step()
        steps += 1
        assert engine.has_runnable or engine.bank.num_slots_used == 3 or engine.loader.is_waiting or engine.loader._loading
    assert steps <= 6


def test_an_admission_that_fails_fails_its_requests_only(model: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(model)
    broken, whole = make("broken", 2), make("whole", 2)
    install = Bank._install

    def fail(bank: Bank, program: object, *places: object) -> object:
        if getattr(program, "program_id", "") == "broken":
            raise torch.OutOfMemoryError("there is no memory")
        return install(bank, program, *places)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Bank, "_install", fail)
        engine.pin_program(broken)
        assert states(settle(engine), "broken") == ["loading", "host", "host load_failed"]
        results = run(engine, [greedy("x", PROMPT, broken), greedy("y", PROMPT, whole), greedy("z", PROMPT)])
        assert not engine.has_runnable
    assert results["x"].error is not None
    assert results["x"].error.code == "internal_error"
    assert (len(results["y"].tokens), len(results["z"].tokens)) == (8, 8)
    assert engine.bank.num_slots_used == 1
    assert len(run(engine, [greedy("x", PROMPT, broken)])["x"].tokens) == 8


def test_a_dropped_program_drains_until_it_is_wanted_again_or_gone(model: Path, make: Make) -> None:
    engine = make_engine(model)
    ref = make("drains", 2)
    for number in range(2):
        engine.add(greedy(str(number), PROMPT, ref, tokens=20))
    settle(engine)
    engine.drop_program("drains")
    assert states(engine.take_events(), "drains") == ["draining"]
    engine.add(greedy("again", PROMPT, ref, tokens=20))
    assert states(engine.take_events(), "drains") == ["resident"]
    engine.drop_program("drains")
    finish(engine)
    assert states(engine.take_events(), "drains") == ["draining", "stored dropped"]
    engine.drop_program("drains")
    assert engine.stats().counters["drops"] == 1


@pytest.mark.parametrize("fault", ["not whole", "unforeseen"])
def test_a_load_ends_whatever_happens_in_it(fault: str, model: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(model)
    ref = make("odd", 2)

    def fail(*_: object, **__: object) -> None:
        raise KeyError("unforeseen") if fault == "unforeseen" else ValueError("it is not whole")

    monkeypatch.setattr("server.engine.loader.check_program", fail)
    error = run(engine, [greedy("x", PROMPT, ref)])["x"].error
    assert error is not None
    assert error.code == "adapter_load_failed"
