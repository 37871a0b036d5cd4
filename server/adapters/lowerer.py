"""The asyncio client of the lowering process: starts it, hands it uploads one at a time, and ends it when it takes too long.

Both ends speak msgspec over a ZeroMQ ipc socket. The program file that results is a cache: it can always be made again from the
adapter's files.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from safetensors import safe_open

from server.adapters.faults import Fault, LoweringError
from server.adapters.identity import program_id

_START_TIMEOUT_S = 120.0


class Start(msgspec.Struct, frozen=True):
    """The first line on the child's standard input; the end of that pipe means that the parent is gone."""

    address: str
    base_dir: str
    base_digest: str
    dtype: str
    max_program_bytes: int
    max_memory_bytes: int


class Job(msgspec.Struct, frozen=True):
    """``files`` are the adapter's by role; see ``lower.checkpoint.read_checkpoint``."""

    files: dict[str, str]
    program: str
    program_id: str


class Done(msgspec.Struct, frozen=True):
    """The end of a job. No faults: the program file is in place."""

    facts: dict[str, Any] = {}
    faults: list[Fault] = []


@dataclass(frozen=True, slots=True)
class LoweredProgram:
    """A program file and what is known of it."""

    program_id: str
    path: Path
    facts: dict[str, Any]


class LowererClient:
    """Lowers adapters in the child, each once however many ask, and keeps the program files."""

    def __init__(
        self,
        base_dir: Path,
        base_digest: str,
        dtype: str,
        programs_dir: Path,
        *,
        timeout_s: float = 120.0,
        max_program_bytes: int = 1 << 30,
        max_memory_bytes: int = 16 << 30,
    ) -> None:
        self._base_digest = base_digest
        self._programs = programs_dir / base_digest[:12]
        self._timeout_s = timeout_s
        self._directory = tempfile.TemporaryDirectory(prefix="medley-")
        self._start = Start("", str(base_dir), base_digest, dtype, max_program_bytes, max_memory_bytes)
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._child: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._under_way: dict[str, asyncio.Task[LoweredProgram]] = {}
        self._starts = 0

    async def start(self) -> None:
        """Start the child and wait until it knows the base."""
        async with self._turn:
            await self._launch()

    async def stop(self) -> None:
        for task in self._under_way.values():
            task.cancel()
        async with self._turn:
            await self._end_child()
        self._context.destroy(linger=0)
        self._directory.cleanup()

    def program_id(self, digest: str) -> str:
        """The id of the program that a single adapter lowers to."""
        return program_id(((digest, 1.0),), self._base_digest)

    async def ensure(self, digest: str, files: Mapping[str, Path]) -> LoweredProgram:
        """The program of the adapter with these files by role, lowered now unless it is there. Raises LoweringError with all faults."""
        name = self.program_id(digest)
        task = self._under_way.get(name)
        if task is None:
            task = asyncio.create_task(self._ensure(name, files))
            self._under_way[name] = task
            task.add_done_callback(lambda _: self._under_way.pop(name, None))
        # One caller that goes away must not take the work from the others.
        return await asyncio.shield(task)

    async def _ensure(self, name: str, files: Mapping[str, Path]) -> LoweredProgram:
        path = self._programs / f"{name}.safetensors"
        if path.exists():
            return LoweredProgram(name, path, await asyncio.to_thread(_facts, path))
        async with self._turn:
            done = await self._run(Job({role: str(file) for role, file in files.items()}, str(path), name))
        if done.faults:
            raise LoweringError(done.faults)
        return LoweredProgram(name, path, done.facts)

    async def _run(self, job: Job) -> Done:
        """Send a job and wait for its end, the time limit, or the child's death."""
        if self._child is None or self._child.returncode is not None:
            await self._launch()
        assert self._socket is not None
        assert self._child is not None
        await self._socket.send(msgspec.msgpack.encode(job))
        receive = asyncio.ensure_future(self._receive())
        died = asyncio.ensure_future(self._child.wait())
        try:
            await asyncio.wait({receive, died}, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if receive.done():
                return receive.result()
            code, message = "lowering_timeout", f"lowering the adapter took longer than {self._timeout_s:.0f} s"
            if died.done():
                code, message = "lowering_crashed", "lowering the adapter ended its process, most likely for want of memory"
            await self._end_child()
            return Done(faults=[Fault(code, "adapter", message)])
        finally:
            receive.cancel()
            died.cancel()

    async def _receive(self) -> Done:
        assert self._socket is not None
        return msgspec.msgpack.decode(await self._socket.recv(), type=Done)

    async def _launch(self) -> None:
        await self._end_child()
        self._programs.mkdir(parents=True, exist_ok=True)
        self._starts += 1
        address = f"ipc://{Path(self._directory.name) / f'lowerer-{self._starts}.sock'}"
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.linger = 0
        self._socket.bind(address)
        self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "server.adapters.lowering_process", stdin=asyncio.subprocess.PIPE
        )
        assert self._child.stdin is not None
        self._child.stdin.write(msgspec.json.encode(msgspec.structs.replace(self._start, address=address)) + b"\n")
        died = asyncio.ensure_future(self._child.wait())
        receive = asyncio.ensure_future(self._receive())
        await asyncio.wait({receive, died}, timeout=_START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if not receive.done():
            receive.cancel()
            await self._end_child()
            raise RuntimeError("the lowering process did not start; its log says why")

    async def _end_child(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._child is not None and self._child.returncode is None:
            self._child.kill()
            await self._child.wait()
        self._child = None


def _facts(path: Path) -> dict[str, Any]:
    """The facts in a program file's metadata; its tensors are not read."""
    with safe_open(path, framework="numpy") as file:
        facts: dict[str, Any] = json.loads(file.metadata()["medley"])["facts"]
        return facts
