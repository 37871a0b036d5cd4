"""Bringing programs into host memory, off the step loop. Knows files and bytes, not sequences.

One file is read once, however many ask for it; what is read is kept, the least recently used going first when the byte budget is
exceeded.
"""

from __future__ import annotations

import queue
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from server.adapters.packed import PackedProgram
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
    """Single-flight loads on threads of their own, and the host tier that they fill.

    ``wake`` is called from a loader thread when a load ends, so that a sleeping engine looks at ``finished``.
    """

    def __init__(self, *, host_bytes: int, threads: int = 2, wake: Callable[[], None] = lambda: None) -> None:
        self._host_bytes = host_bytes
        self._wake = wake
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="program-loader")
        self._loading: set[str] = set()
        self._finished: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._host: OrderedDict[str, PackedProgram] = OrderedDict()
        self.used_bytes = 0

    @property
    def is_loading(self) -> bool:
        return bool(self._loading)

    @property
    def is_waiting(self) -> bool:
        """Whether loads are under way and none of them has ended since ``finished`` was last called."""
        return self.is_loading and self._finished.empty()

    def get(self, program_id: str) -> PackedProgram | None:
        """A program of the host tier, or None."""
        program = self._host.get(program_id)
        if program is not None:
            self._host.move_to_end(program_id)
        return program

    def request(self, ref: ProgramRef) -> bool:
        """Start loading unless that is under way. True when this call started it."""
        if ref.program_id in self._loading:
            return False
        self._loading.add(ref.program_id)
        self._pool.submit(self._load, ref)
        return True

    def finished(self) -> list[Loaded]:
        """Loads that ended since the last call. Their programs are in the host tier now."""
        ended = []
        while not self._finished.empty():
            loaded = self._finished.get()
            self._loading.discard(loaded.program_id)
            if loaded.program is not None:
                self._keep(loaded.program)
            ended.append(loaded)
        return ended

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _load(self, ref: ProgramRef) -> None:
        started = time.monotonic()
        program: PackedProgram | None = None
        try:
            found, problem = read_program(Path(ref.path)), ""
            if found.program_id == ref.program_id:
                program = found
            else:
                problem = f"the file holds program {found.program_id[:12]}"
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, struct.error) as error:
            problem = f"{type(error).__name__}: {error}"
        self._finished.put(Loaded(ref.program_id, program, time.monotonic() - started, problem))
        self._wake()

    def _keep(self, program: PackedProgram) -> None:
        self._host[program.program_id] = program
        self.used_bytes += program.nbytes
        # The newest stays even when it alone is over the budget: somebody waits for it.
        while self.used_bytes > self._host_bytes and len(self._host) > 1:
            _, dropped = self._host.popitem(last=False)
            self.used_bytes -= dropped.nbytes
