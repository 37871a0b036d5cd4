"""Resident memory of a server's processes over time."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil

_INTERVAL_S = 1.0
_NAMES = {"server": "HTTP", "server.engine.process": "engine", "server.adapters.lowering_process": "lowering"}
"""Modules that the processes run, and what they are called."""


@dataclass(slots=True)
class Memory:
    """Samples ``(seconds, MiB)`` by process."""

    samples: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """Start, end (MiB) and slope (MiB a minute) of each process."""
        return [
            {
                "process": name,
                "start_mib": round(taken[0][1], 1),
                "end_mib": round(taken[-1][1], 1),
                "slope_mib_per_min": round(statistics.linear_regression(*zip(*taken, strict=True)).slope * 60, 2),
            }
            for name, taken in self.samples.items()
            if len(taken) > 1
        ]


@asynccontextmanager
async def watched_memory() -> AsyncIterator[Memory]:
    """Watches the one server that this process started."""
    memory = Memory()
    found = [(name, process) for process in psutil.Process().children(recursive=True) if (name := process_name(process))]

    async def watch() -> None:
        while True:
            for name, process in found:
                memory.samples.setdefault(name, []).append((time.monotonic(), process.memory_info().rss / (1 << 20)))
            await asyncio.sleep(_INTERVAL_S)

    watcher = asyncio.create_task(watch())
    try:
        yield memory
    finally:
        watcher.cancel()


def process_name(process: psutil.Process) -> str | None:
    """What a process is called, by the module that it runs."""
    line = process.cmdline()
    return _NAMES.get(line[line.index("-m") + 1]) if "-m" in line else None
