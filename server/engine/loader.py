"""Bringing programs into host memory, off the step loop. Knows files, not sequences, and not what is done with a program.

One file is read once, however many ask for it meanwhile.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from server.adapters.base_spec import BaseSpec
from server.adapters.packed import PackedProgram
from server.adapters.program_check import check_program
from server.adapters.program_file import read_program
from server.engine.types import ProgramRef


@dataclass(frozen=True, slots=True)
class Loaded:
    """The end of one load. ``program`` None: it failed, ``problem`` says why."""

    program_id: str
    program: PackedProgram | None
    seconds: float
    problem: str = ""


class Loader:
    """Single-flight loads of programs for one base, on threads of their own.

    ``wake`` is called from a loader thread when a load ends, so that a sleeping engine looks at ``finished``. ``pin_memory``: into memory
    that a device copies from.
    """

    def __init__(
        self, spec: BaseSpec, *, threads: int = 2, pin_memory: bool = False, wake: Callable[[], None] = lambda: None
    ) -> None:
        self._spec = spec
        self._threads = threads
        self._wake = wake
        self._pin_memory = pin_memory
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="program-loader")
        self._loading: set[str] = set()
        self._finished: queue.SimpleQueue[Loaded] = queue.SimpleQueue()

    @property
    def is_waiting(self) -> bool:
        """Whether loads are under way and none of them has ended since ``finished`` was last called."""
        return bool(self._loading) and self._finished.empty()

    @property
    def is_busy(self) -> bool:
        """Whether another load would have to wait for one that is under way."""
        return len(self._loading) >= self._threads

    def is_loading(self, program_id: str) -> bool:
        """Whether a load is under way, or has ended and ``finished`` has not told of it."""
        return program_id in self._loading

    def size(self, ref: ProgramRef) -> int:
        """The bytes that a load takes in the host. 0 for a file that is not there: the load will fail, and say so."""
        try:
            return os.stat(ref.path).st_size
        except OSError:
            return 0

    def request(self, ref: ProgramRef) -> None:
        """Start loading unless that is under way."""
        if ref.program_id not in self._loading:
            self._loading.add(ref.program_id)
            self._pool.submit(self._load, ref)

    def finished(self) -> list[Loaded]:
        """Loads that ended since the last call."""
        ended = []
        while not self._finished.empty():
            loaded = self._finished.get()
            self._loading.discard(loaded.program_id)
            ended.append(loaded)
        return ended

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, ref: ProgramRef) -> None:
        started = time.monotonic()
        program: PackedProgram | None = None
        try:
            found, problem = read_program(Path(ref.path), pin_memory=self._pin_memory), ""
            if found.program_id != ref.program_id:
                problem = f"the file holds program {found.program_id[:12]}"
            else:
                check_program(found, self._spec)
                program = found
        except Exception as error:  # noqa: BLE001 - whatever it was: a load that never ended would be waited for for ever
            problem = f"{type(error).__name__}: {error}"
        self._finished.put(Loaded(ref.program_id, program, time.monotonic() - started, problem))
        self._wake()
