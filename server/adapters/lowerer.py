"""The asyncio client of the lowering process: starts it, hands it uploads and compositions one at a time, tenants taking turns, and ends it
when it takes too long.

Both ends speak msgspec over a ZeroMQ ipc socket. The program file that results is a cache: it can always be made again from the
adapters' files.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from safetensors import SafetensorError, safe_open

from server.adapters.faults import Fault, LoweringError
from server.adapters.identity import program_id
from server.adapters.program_files import ProgramFiles
from server.adapters.turns import TooManyWaiting, Turns

_START_TIMEOUT_S = 120.0
_FETCHES = 4
"""Adapters whose files are fetched at a time."""
_MAX_WAITING = 16
"""Uploads and compositions of a tenant that may wait for their turn."""
_NOBODY = ""
"""Starting and stopping have their turns too."""
Checkout = Callable[[], AbstractContextManager[Mapping[str, Path]]]
"""An adapter's files by role, which stay while the context is open. Called only where they are needed, in a thread: it may have to fetch them."""


class Start(msgspec.Struct, frozen=True):
    """The first line on the child's standard input; the end of that pipe means that the parent is gone."""

    address: str
    base_dir: str
    base_digest: str
    dtype: str
    max_program_bytes: int
    max_memory_bytes: int


class Job(msgspec.Struct, frozen=True, tag=True):
    """Lower an adapter's files to a program file. ``files`` are by role; see ``lower.checkpoint.read_checkpoint``."""

    files: dict[str, str]
    program: str
    program_id: str


class Ingredient(msgspec.Struct, frozen=True):
    """A program file that goes into a composition. ``digest`` is the adapter's."""

    digest: str
    weight: float
    program: str


class Compose(msgspec.Struct, frozen=True, tag=True):
    """Make one program file of several; ``drop`` leaves out the edits of the first layers."""

    parts: list[Ingredient]
    drop: int
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
        max_disk_bytes: int = 64 << 30,
        on_unused: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``on_unused`` is told of a deleted adapter's programs when nobody uses them any more."""
        self._base_digest = base_digest
        self._files = ProgramFiles(programs_dir / base_digest[:12], max_disk_bytes, on_unused)
        self._timeout_s = timeout_s
        self._directory = tempfile.TemporaryDirectory(prefix="medley-")
        self._start = Start("", str(base_dir), base_digest, dtype, max_program_bytes, max_memory_bytes)
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._child: asyncio.subprocess.Process | None = None
        self._turns = Turns(_MAX_WAITING)
        # Fetching files may take long: those who wait for other threads are not to wait for it.
        self._fetching = ThreadPoolExecutor(_FETCHES, thread_name_prefix="checkout")
        self._under_way: dict[str, asyncio.Task[LoweredProgram]] = {}
        self._starts = 0

    async def start(self, stored: Collection[str]) -> None:
        """Start the child and wait until it knows the base. Programs of other adapters than the ``stored`` digests are removed."""
        await asyncio.to_thread(self._files.open, {self.program_id(digest): digest for digest in stored})
        async with self._turns.of(_NOBODY):
            await self._launch()

    async def stop(self) -> None:
        for task in self._under_way.values():
            task.cancel()
        async with self._turns.of(_NOBODY):
            await self._end_child()
        self._context.destroy(linger=0)
        self._directory.cleanup()
        self._fetching.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._files.close)

    def program_id(self, digest: str) -> str:
        """The id of the program that a single adapter lowers to."""
        return program_id(((digest, 1.0),), self._base_digest)

    def using(self, parts: Sequence[tuple[str, float]], drop: int = 0, *, since: float) -> AbstractContextManager[None]:
        """Keeps the program file of the adapters ``(digest, weight)`` for as long as a request may need it.

        ``since``: ``time.monotonic()`` from before the store was asked for the adapters.
        """
        name = program_id(tuple(parts), self._base_digest, drop=drop)
        return self._files.using(name, frozenset(digest for digest, _ in parts), since)

    async def ensure(self, tenant: str, digest: str, checkout: Checkout) -> LoweredProgram:
        """The program of one adapter, lowered now from its files unless it is there. Call it, and use what it gives, ``using`` it.

        Raises LoweringError with all faults, and TooManyWaiting when the tenant has too much under way.
        """
        name = self.program_id(digest)
        return await self._once(name, lambda: self._ensure(tenant, name, checkout))

    async def compose(self, tenant: str, parts: Sequence[tuple[str, float]], drop: int = 0) -> LoweredProgram:
        """The program of several adapters together, without the edits of the first ``drop`` layers.

        Call it, and use what it gives, ``using`` them. Their own programs must be there: ``ensure`` each of them first. Raises TooManyWaiting, and
        LoweringError, whose faults are ``not_composable`` where the adapters do not add up.
        """
        name = program_id(tuple(parts), self._base_digest, drop=drop)
        return await self._once(name, lambda: self._compose(tenant, name, parts, drop))

    def keep(self, digest: str) -> None:
        """An adapter was stored whose program is in use. Had the same files been deleted meanwhile, their program would go after use."""
        self._files.keep(digest)

    def discard(self, program_id: str) -> None:
        """A program's file cannot be loaded: make another when it is asked for again."""
        self._files.discard(program_id)

    def forget(self, digest: str) -> list[str]:
        """An adapter was deleted: what is made of it goes too. Returns the ids of the programs that nobody uses; ``on_unused`` tells of the
        others when their users are gone."""
        single = self.program_id(digest)
        # It may be on the device without a file: files have a budget of their own.
        return list(dict.fromkeys([*self._files.forget(digest), *([] if self._files.knows(single) else [single])]))

    async def _once(self, name: str, make: Callable[[], Coroutine[Any, Any, LoweredProgram]]) -> LoweredProgram:
        """However many ask at a time, a program is made once."""
        task = self._under_way.get(name)
        is_own = task is None
        if task is None:
            task = asyncio.create_task(make())
            self._under_way[name] = task
            task.add_done_callback(lambda _: self._under_way.pop(name, None))
        try:
            # One caller that goes away must not take the work from the others.
            return await asyncio.shield(task)
        except TooManyWaiting:
            # Of another tenant, which asked first.
            if is_own:
                raise
            return await self._once(name, make)

    async def _ensure(self, tenant: str, name: str, checkout: Checkout) -> LoweredProgram:
        if (found := await self._find(name)) is not None:
            return found
        async with AsyncExitStack() as stack:
            context = checkout()
            loop = asyncio.get_running_loop()
            files = await loop.run_in_executor(self._fetching, context.__enter__)
            stack.push_async_callback(loop.run_in_executor, self._fetching, context.__exit__, None, None, None)
            job = Job({role: str(file) for role, file in files.items()}, str(self._files.path(name)), name)
            return await self._make(tenant, job)

    async def _compose(self, tenant: str, name: str, parts: Sequence[tuple[str, float]], drop: int) -> LoweredProgram:
        if (found := await self._find(name)) is not None:
            return found
        ingredients = [Ingredient(digest, weight, str(self._files.path(self.program_id(digest)))) for digest, weight in parts]
        return await self._make(tenant, Compose(ingredients, drop, str(self._files.path(name)), name))

    async def _find(self, name: str) -> LoweredProgram | None:
        """The program, if its file is there and can be read."""
        path = self._files.find(name)
        if path is None:
            return None
        facts = self._files.facts(name)
        if facts is None:
            # Left by an earlier process; what cannot be read is made again.
            try:
                facts = await asyncio.to_thread(_facts, path)
            except (OSError, SafetensorError, KeyError, TypeError, ValueError):
                return None
            self._files.remember(name, facts)
        return LoweredProgram(name, path, facts)

    async def _make(self, tenant: str, job: Job | Compose) -> LoweredProgram:
        async with self._turns.of(tenant):
            done = await self._run(job)
        if done.faults:
            raise LoweringError(done.faults)
        self._files.add(job.program_id, done.facts)
        return LoweredProgram(job.program_id, Path(job.program), done.facts)

    async def _run(self, job: Job | Compose) -> Done:
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
