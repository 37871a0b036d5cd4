"""What the engine's events add up to."""

from __future__ import annotations

from server.engine.types import ProgramEvent, ProgramState
from server.residents import MAX_CHANGES, MAX_REMEMBERED, Residents

STORED, LOADING, HOST, RESIDENT, DRAINING = ProgramState


class Process:
    """The engine's process, as far as residents know it."""

    pid: int | None = 1

    def __call__(self) -> int | None:
        return self.pid


def test_a_programs_way_there_and_back() -> None:
    residents = Residents(Process())
    residents.asked("p", ("sha256:a",), "acme")
    residents.apply(ProgramEvent("p", LOADING))
    assert residents.states() == {"p": "loading"}
    residents.apply(ProgramEvent("p", HOST, 100, 0.5))
    residents.apply(ProgramEvent("p", RESIDENT, 120, 0.25))
    item = residents.of("p")
    assert item is not None
    assert (item.state, item.nbytes, item.load_seconds) == (RESIDENT, 120, {"host": 0.5, "resident": 0.25})
    assert (item.loads, item.admissions, item.evictions, item.failures, item.digests) == (1, 1, 0, 0, ("sha256:a",))
    assert item.last_used is not None
    assert item.since >= item.last_used
    residents.apply(ProgramEvent("p", HOST, reason="evicted"))
    assert (item.evictions, item.nbytes) == (1, 120)
    residents.apply(ProgramEvent("p", RESIDENT, 120, 0.1))
    residents.apply(ProgramEvent("p", DRAINING))
    assert (item.evictions, item.admissions) == (1, 2)
    residents.apply(ProgramEvent("p", STORED, reason="dropped"))
    assert (item.evictions, item.nbytes) == (2, 0)
    assert residents.states() == {}
    assert residents.of("p") is item
    residents.apply(ProgramEvent("p", LOADING))
    residents.apply(ProgramEvent("p", STORED, reason="load_failed"))
    assert (item.failures, item.loads) == (1, 1)


def test_another_process_holds_nothing() -> None:
    process = Process()
    residents = Residents(process)
    assert residents.take_changes() is None
    residents.apply(ProgramEvent("p", HOST, 100, 0.5))
    assert residents.take_changes() == [("p", HOST)]
    assert residents.take_changes() == []
    process.pid = None
    assert residents.states() == {}
    residents.apply(ProgramEvent("late", HOST))
    process.pid = 2
    residents.apply(ProgramEvent("q", LOADING))
    assert residents.states() == {"q": "loading"}
    assert residents.take_changes() is None
    item = residents.of("p")
    assert item is not None
    assert (item.state, item.nbytes, item.loads) == (STORED, 0, 0)


def test_memory_is_bounded() -> None:
    residents = Residents(Process())
    residents.take_changes()
    residents.apply(ProgramEvent("held", HOST))
    for index in range(MAX_REMEMBERED + 10):
        residents.asked(str(index), (), "acme")
    assert residents.of("0") is None
    assert residents.of(str(MAX_REMEMBERED + 9)) is not None
    assert residents.states() == {"held": "host"}
    for _ in range(MAX_CHANGES + 1):
        residents.apply(ProgramEvent("held", HOST))
    assert residents.take_changes() is None
    assert residents.take_changes() == []
