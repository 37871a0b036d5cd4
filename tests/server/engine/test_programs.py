"""Programs through disk, host and device: what is told of them is true, what is dropped is gone, what is pinned stays, nobody else waits."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from adapter_store.residency import TRANSITIONS
from server.engine import loader, tiers
from server.engine.engine import Engine
from server.engine.types import FinishReason, ProgramRef, ProgramState, Task
from tests.harness import greedy, make_engine, run
from tests.server.engine.stepping import Clock, Make, finish, settle, states, wait_for_loads

PROMPT = [9, 200, 31, 77]


def bytes_held(engine: Engine) -> tuple[int, int, int, int]:
    return engine.bank.used_bytes, engine.bank.num_slots_used, engine.host.used_bytes, engine.host.reserved_bytes


def test_history_of_a_program_and_hits_by_tier(model: Path, make: Make) -> None:
    engine = make_engine(model, max_slots=1)
    first, second = make("first", 2), make("second", 2)
    for ref in (first, first, second, first):
        run(engine, [greedy("x", PROMPT, ref)])
    events = engine.take_events()
    assert states(events, "first") == ["loading", "host", "resident", "host evicted", "resident"]
    loaded, resident = (next(e for e in events if e.state is state) for state in (ProgramState.HOST, ProgramState.RESIDENT))
    assert min(loaded.seconds, resident.seconds, loaded.nbytes) > 0
    assert loaded.nbytes == Path(first.path).stat().st_size
    counters = engine.stats().counters
    tiers = {name: counters[name] for name in ("resident_hits", "host_hits", "disk_hits", "loads", "admissions", "evictions")}
    assert tiers == {"resident_hits": 1, "host_hits": 1, "disk_hits": 2, "loads": 2, "admissions": 3, "evictions": 2}


def test_a_drop_frees_host_and_device_at_once(model: Path, make: Make) -> None:
    engine = make_engine(model)
    ref = make("dropped", 2)
    before = run(engine, [greedy("x", PROMPT, ref)])["x"].tokens
    engine.drop_program("dropped")
    assert bytes_held(engine) == (0, 0, 0, 0)
    engine.drop_program("dropped")
    engine.drop_program("never heard of")
    assert states(engine.take_events(), "dropped") == ["loading", "host", "resident", "stored dropped"]
    assert run(engine, [greedy("x", PROMPT, ref)])["x"].tokens == before
    assert states(engine.take_events(), "dropped") == ["loading", "host", "resident"]


def test_a_drop_waits_for_those_that_were_accepted(model: Path, make: Make) -> None:
    """One that runs and one that waits for its turn end as if nothing had happened; then the memory is free in the same step."""
    engine = make_engine(model, max_running=1)
    ref = make("used", 2)
    alone = run(engine, [greedy("x", PROMPT, ref)])["x"].tokens
    for name in ("running", "waiting"):
        engine.add(greedy(name, PROMPT, ref))
    engine.step()
    engine.drop_program("used")
    tokens: dict[str, list[int]] = {"running": [], "waiting": []}
    while engine.has_unfinished:
        assert engine.bank.used_bytes
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    assert bytes_held(engine) == (0, 0, 0, 0)
    assert tokens["waiting"] == alone
    assert alone[-len(tokens["running"]) :] == tokens["running"]


def test_a_load_under_way_is_thrown_away_unless_somebody_waits(model: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    go, read = threading.Event(), loader.read_program
    monkeypatch.setattr(loader, "read_program", lambda *args, **more: go.wait(60) and read(*args, **more))
    engine = make_engine(model)
    ref = make("late", 2)
    engine.add(greedy("gone", PROMPT, ref))
    engine.abort("gone")
    engine.drop_program("late")
    go.set()
    assert states(settle(engine), "late") == ["loading", "stored dropped"]
    assert bytes_held(engine) == (0, 0, 0, 0)
    go.clear()
    engine.load_program(ref)
    engine.step()
    engine.drop_program("late")
    engine.add(greedy("wants it", PROMPT, ref))
    go.set()
    assert finish(engine)["wants it"].finish_reason is FinishReason.LENGTH


def test_explicit_pins_stay_and_take_half_at_most(model: Path, make: Make) -> None:
    engine = make_engine(model, max_slots=4)
    refs = [make(f"pin-{index}", 2) for index in range(3)]
    events = []
    for ref in refs:
        engine.pin_program(ref)
        events += settle(engine)
    assert [engine.bank.find(ref.program_id) is not None for ref in refs] == [True, True, False]
    assert states(events, "pin-2") == ["loading", "host", "host pin_limit"]
    stats = engine.stats()
    assert stats.bank_bytes_pinned == stats.bank_bytes_used > 0
    run(engine, [greedy(str(index), PROMPT, make(f"other-{index}", 2)) for index in range(8)])
    assert states(engine.take_events(), "pin-0") == []
    engine.unpin_program("pin-0")
    engine.pin_program(refs[2])
    settle(engine)
    assert engine.bank.find("pin-2") is not None
    engine.drop_program("pin-1")
    engine.unpin_program("pin-2")
    assert engine.bank.find("pin-1") is None
    assert engine.stats().bank_bytes_pinned == 0


def test_what_pins_leave_no_room_for_is_refused_and_the_pin_of_a_broken_file_ends(
    model: Path, make: Make, tmp_path: Path
) -> None:
    small, large = make("small", 8), make("large", 12)
    footprint = make_engine(model).bank.footprint(loader.read_program(Path(small.path)))
    engine = make_engine(model, bank_bytes=2 * footprint)
    (tmp_path / "broken").write_bytes(b"nonsense")
    engine.pin_program(ProgramRef("broken", str(tmp_path / "broken")))
    engine.pin_program(small)
    events = settle(engine)
    assert states(events, "broken") == ["loading", "stored load_failed"]
    assert engine.bank.find("small") is not None
    assert engine.bank.footprint(loader.read_program(Path(large.path))) <= engine.bank.capacity_bytes
    result = run(engine, [greedy("x", PROMPT, large), greedy("y", PROMPT)])
    assert result["x"].error is not None
    assert (result["x"].error.code, len(result["y"].tokens)) == ("program_too_large", 8)
    engine.unpin_program("small")
    assert len(run(engine, [greedy("x", PROMPT, large)])["x"].tokens) == 8


def test_a_prefetched_program_is_there_and_has_pushed_nobody_out(model: Path, make: Make) -> None:
    clock = Clock()
    engine = make_engine(model, max_slots=1, clock=clock)
    mine, ahead = make("mine", 2), make("ahead", 2)
    engine.load_program(mine)
    assert states(settle(engine), "mine") == ["loading", "host", "resident"]
    run(engine, [greedy("x", PROMPT, mine, tenant="me")])
    engine.load_program(ahead)
    assert states(settle(engine), "ahead") == ["loading", "host"]
    assert engine.bank.find("mine") is not None
    clock.now += 11
    engine.load_program(ahead)
    assert states(settle(engine), "ahead") == ["resident"]
    assert engine.stats().counters["resident_hits"] == 1


def test_a_step_copies_a_bounded_amount_and_decodes_go_on(model: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bytes: six programs in the host, of which two fit into a step's copies, and one that alone is more."""
    engine = make_engine(model)
    refs = [*(make(f"many-{index}", 2) for index in range(5)), make("more", 12)]
    footprints = [engine.bank.footprint(loader.read_program(Path(ref.path))) for ref in refs]
    limit = footprints[0] * 5 // 2
    assert footprints[-1] > limit
    monkeypatch.setattr(tiers, "COPY_BYTES_PER_STEP", limit)
    for ref in refs:
        engine.load_program(ref)
    settle(engine, 30)
    for ref in refs:
        engine.bank.evict(ref.program_id)
    engine.add(greedy("others", PROMPT, tokens=40))
    engine.step()
    for ref in refs:
        engine.add(greedy(ref.program_id, PROMPT, ref))
    copied = []
    while len(copied) < 5:
        before = engine.bank.copies.total
        assert "others" in [output.request_id for output in engine.step()]
        copied.append(engine.bank.copies.total - before)
    assert sorted(copied) == sorted([0, footprints[0], *[2 * footprints[0]] * 2, footprints[-1]])
    assert engine.stats().counters["loads"] == len(refs)
    assert len(finish(engine)) == 7


def test_a_load_runs_while_its_request_waits_behind_others(model: Path, make: Make) -> None:
    """Nothing but ``add`` is needed for a load to begin, and no place in the batch."""
    engine = make_engine(model, max_running=1)
    engine.add(greedy("first", PROMPT, tokens=30))
    engine.step()
    engine.add(greedy("behind", PROMPT, make("behind", 2)))
    wait_for_loads(engine)
    engine.step()
    assert states(engine.take_events(), "behind") == ["loading", "host"]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.waiting_for_adapter) == (1, 1, 0)
    assert set(finish(engine)) == {"first", "behind"}


def test_a_tenant_that_cycles_many_adapters_takes_none_of_anothers(model: Path, make: Make) -> None:
    """TEN-10: 200 adapters of one tenant, three of another that are used every few seconds, eight slots and a small host tier."""
    clock = Clock()
    size = Path(make("size", 1).path).stat().st_size
    engine = make_engine(model, max_slots=8, host_bytes=12 * size, clock=clock)
    mine = [make(f"mine-{index}", 1) for index in range(3)]
    cycled = [make(f"cycled-{index}", 1) for index in range(200)]
    events = []
    for index in range(len(cycled)):
        if index % 20 == 0:
            run(engine, [greedy(f"b{number}", PROMPT, held, tokens=1, tenant="b") for number, held in enumerate(mine)])
        if index % 4 == 0:
            batch = cycled[index : index + 4]
            run(engine, [greedy(f"a{number}", PROMPT, held, tokens=1, tenant="a") for number, held in enumerate(batch)])
        clock.now += 0.25
        events += engine.take_events()
        assert engine.host.used_bytes + engine.host.reserved_bytes <= engine.host.capacity_bytes
    assert engine.stats().counters["evictions"] >= 190
    for ref in mine:
        assert states(events, ref.program_id) == ["loading", "host", "resident"]
    assert engine.stats().counters["resident_hits"] >= 3 * 9
    # Once it is idle, its room is everybody's.
    clock.now += 11
    for index in range(0, 24, 8):
        run(engine, [greedy(str(number), PROMPT, cycled[index + number], tokens=1, tenant="a") for number in range(8)])
    assert not any(engine.bank.find(ref.program_id) for ref in mine)


def test_one_larger_than_its_share_waits_and_is_served(model: Path, make: Make) -> None:
    """The bank is two active tenants' own; a third asks for more than a third of it, again and again they for theirs."""
    clock = Clock()
    small, large = [make(f"guarded-{index}", 2) for index in range(2)], make("wide", 5)
    engine = make_engine(model, clock=clock)
    footprint = engine.bank.footprint(loader.read_program(Path(large.path)))
    engine.close()
    engine = make_engine(model, bank_bytes=footprint + 4096, clock=clock)
    engine.add(greedy("c", PROMPT, large, tokens=1, tenant="c"))
    ended = set()
    for turn in range(200):
        clock.now += 0.2
        for tenant, ref in zip("ab", small, strict=True):
            engine.add(greedy(f"{tenant}{turn}", PROMPT, ref, tokens=3, tenant=tenant))
        for _ in range(3):
            ended |= {output.request_id for output in engine.step() if output.finish_reason}
        if "c" in ended:
            break
    else:
        raise AssertionError("it was never served")
    finish(engine)


def test_every_history_is_legal(model: Path, make: Make) -> None:
    """What the registry checks is checked here of a plain life; ``test_churn`` does so of 500 wild ones."""
    engine = make_engine(model, max_slots=1, host_bytes=1)
    refs = [make(f"legal-{index}", 2) for index in range(3)]
    run(engine, [greedy(str(index), PROMPT, refs[index % 3], tenant=str(index % 2)) for index in range(9)])
    current = {}
    for event in engine.take_events():
        before = current.get(event.program_id, "stored")
        assert event.state == before or event.state in TRANSITIONS[before], (before, event)
        current[event.program_id] = event.state.value


def test_a_request_that_is_refused_after_its_load_leaves_nothing(model: Path, make: Make) -> None:
    engine = make_engine(model)
    refused = replace(greedy("x", PROMPT, make("no-head", 2)), task=Task.CLASSIFY)
    assert run(engine, [refused])["x"].error is not None
    engine.drop_program("no-head")
    assert bytes_held(engine) == (0, 0, 0, 0)
