"""Stepping an engine in tests, whatever else the machine does: bounded by what is done, with one generous watchdog."""

from __future__ import annotations

import time
from collections.abc import Callable

from server.engine.engine import Engine
from server.engine.types import ProgramEvent, ProgramRef, RequestOutput

WATCHDOG_S = 60.0
Make = Callable[[str, int], ProgramRef]
"""Writes a program file, by name and rank."""


class Clock:
    """Seconds as the test says."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def states(events: list[ProgramEvent], name: str) -> list[str]:
    return [event.state.value + (f" {event.reason}" if event.reason else "") for event in events if event.program_id == name]


def wait_for_loads(engine: Engine) -> None:
    """Until one that is under way has ended, if any is."""
    end = time.monotonic() + WATCHDOG_S
    while engine.loader.is_waiting:
        assert time.monotonic() < end, "a load does not end"
        time.sleep(0.001)


def settle(engine: Engine, steps: int = 3) -> list[ProgramEvent]:
    """Step until loads have ended and a little longer."""
    events = []
    for _ in range(steps):
        wait_for_loads(engine)
        engine.step()
        events += engine.take_events()
    return events


def finish(engine: Engine, tick: Callable[[], None] = lambda: None) -> dict[str, RequestOutput]:
    """Step to the end, with a tick before every step. Returns the last output of every request."""
    ended = {}
    end = time.monotonic() + WATCHDOG_S
    while engine.has_unfinished:
        assert time.monotonic() < end, "requests do not end"
        tick()
        ended.update({output.request_id: output for output in engine.step() if output.finish_reason})
        if not engine.has_runnable:
            time.sleep(0.001)
    return ended
