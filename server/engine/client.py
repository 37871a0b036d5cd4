"""The asyncio side of the engine process: starts it, talks to it, and restarts it when it dies.

Every stream that ``submit`` opens ends with an output whose ``finish_reason`` is set, whatever happens to the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from server.engine.settings import EngineSettings
from server.engine.types import (
    EngineInfo,
    EngineStats,
    FinishReason,
    ProgramEvent,
    ProgramRef,
    Request,
    RequestError,
    RequestOutput,
)
from server.engine.wire import Abort, Add, Drop, Fatal, FromEngine, Load, Pin, Ready, Start, Step, ToEngine, Unpin

BREAKER_CRASHES = 5
BREAKER_WINDOW_S = 60.0
STALL_S = 60.0
PINS_END_WITH = ("pin_limit", "load_failed")
"""Reasons of events that mean that a program is not pinned any more."""
_RESTARTING = RequestError("engine_restarting", "the engine process ended and is being restarted; try again")

log = logging.getLogger(__name__)


class EngineUnavailable(Exception):
    """No engine can take the request now. ``code`` is one of docs/ERRORS.md."""

    def __init__(self, message: str, code: str = "engine_unavailable") -> None:
        super().__init__(message)
        self.code = code


class EngineOverloaded(Exception):
    """The queue is full; ``retry_after_s`` is a guess at when it will not be."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class EngineClient:
    """One engine process and the streams of its requests. ``on_event`` is called for every program state change."""

    def __init__(self, settings: EngineSettings, *, on_event: Callable[[ProgramEvent], None]) -> None:
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.restarts = 0
        self._settings = settings
        self._on_event = on_event
        self._streams: dict[str, asyncio.Queue[RequestOutput]] = {}
        self._pins: dict[str, ProgramRef] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
        self._context = zmq.asyncio.Context()
        self._directory = tempfile.TemporaryDirectory(prefix="medley-")
        self._socket: zmq.asyncio.Socket | None = None
        self._child: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._crashes: deque[float] = deque(maxlen=BREAKER_CRASHES)
        self._starts = 0
        self._heard = 0.0
        self._running = False

    @property
    def ready(self) -> bool:
        """A process is up, has loaded the model and has been heard from lately."""
        return self._running and time.monotonic() - self._heard < STALL_S

    @property
    def pid(self) -> int | None:
        """The engine's process id, None while there is none."""
        return self._child.pid if self._child is not None and self._child.returncode is None else None

    async def start(self) -> EngineInfo:
        """Start the process and wait for the model. Raises EngineUnavailable with the reason when it cannot start."""
        info = await self._launch()
        self._watch = asyncio.create_task(self._supervise(), name="engine-supervisor")
        return info

    async def stop(self) -> None:
        """End the process; streams that are still open end with an error."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        await self._end_child()
        self._fail_streams(RequestError("server_stopping", "the server is shutting down"))
        self._context.destroy(linger=0)
        self._directory.cleanup()

    async def submit(self, request: Request) -> AsyncIterator[RequestOutput]:
        """Run a request. Raises EngineOverloaded or EngineUnavailable before the first output; closing it aborts the request."""
        if not self.ready:
            raise EngineUnavailable(_RESTARTING.message, "engine_restarting")
        if len(self._streams) >= self._settings.max_waiting + self._settings.max_running:
            raise EngineOverloaded(self._retry_after())
        stream: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._streams[request.request_id] = stream
        ended = False
        try:
            await self._send(Add(request))
            while not ended:
                output = await stream.get()
                ended = output.finish_reason is not None
                yield output
        finally:
            self._streams.pop(request.request_id, None)
            if not ended and self._running:
                await self._send(Abort(request.request_id))

    async def drop_program(self, program_id: str) -> None:
        """Free a deleted adapter's memory as soon as nothing uses it, pinned or not."""
        self._pins.pop(program_id, None)
        await self._tell(Drop(program_id))

    async def pin_program(self, program: ProgramRef) -> None:
        """Bring a program to the device and keep it there, also in a process that is started later. Whether it fits beside the other pins
        is to be asked of ``pins_fit`` before; what is refused all the same is told by an event with the reason ``pin_limit``."""
        self._pins[program.program_id] = program
        await self._tell(Pin(program))

    async def unpin_program(self, program_id: str) -> None:
        """Let a program be evicted again."""
        self._pins.pop(program_id, None)
        await self._tell(Unpin(program_id))

    async def load_program(self, program: ProgramRef) -> None:
        """Bring a program to where it is quickly at hand, before anybody asks for it."""
        await self._tell(Load(program))

    def pins_fit(self, sizes: Collection[int]) -> bool:
        """Whether programs of these sizes (bytes) may be pinned, all of them together."""
        return self._settings.pins_fit(sizes)

    def _retry_after(self) -> float:
        step, rows = self.stats.last_step_seconds, max(self.stats.last_step_rows, 1)
        return min(30.0, max(1.0, step * 64 * self.stats.waiting / rows))

    async def _tell(self, message: ToEngine) -> None:
        """Send what a process that is being restarted need not hear: it starts with nothing, and gets the pins."""
        if self._running:
            await self._send(message)

    async def _send(self, message: ToEngine) -> None:
        if self._socket is None:
            raise EngineUnavailable(_RESTARTING.message, "engine_restarting")
        await self._socket.send(self._encoder.encode(message))

    async def _launch(self) -> EngineInfo:
        self._starts += 1
        address = f"ipc://{Path(self._directory.name) / f'engine-{self._starts}.sock'}"
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.linger = 0
        self._socket.bind(address)
        self._child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "server.engine.process", stdin=asyncio.subprocess.PIPE
        )
        assert self._child.stdin is not None
        self._child.stdin.write(msgspec.json.encode(Start(address, self._settings)) + b"\n")
        first = await self._first_message()
        if not isinstance(first, Ready):
            await self._end_child()
            reason = first.message if isinstance(first, Fatal) else "the engine process ended while starting"
            raise EngineUnavailable(reason, "engine_start_failed")
        self.info = first.info
        self._heard = time.monotonic()
        self._running = True
        await self._send_pins()
        return first.info

    async def _send_pins(self) -> None:
        """Tell a new process what is pinned. What is let go while others are sent stays so."""
        for program in list(self._pins.values()):
            if program.program_id in self._pins:
                await self._send(Pin(program))

    async def _first_message(self) -> FromEngine | None:
        """The child's first message, or None when it ends before one."""
        assert self._socket is not None
        assert self._child is not None
        receive = asyncio.ensure_future(self._receive(self._socket))
        wait = asyncio.ensure_future(self._child.wait())
        done, _ = await asyncio.wait({receive, wait}, return_when=asyncio.FIRST_COMPLETED)
        if receive in done:
            wait.cancel()
            return receive.result()
        receive.cancel()
        return None

    async def _receive(self, socket: zmq.asyncio.Socket) -> FromEngine:
        return self._decoder.decode(await socket.recv())

    async def _supervise(self) -> None:
        """Pump messages until the process dies; then fail what was in flight and start another."""
        while True:
            assert self._socket is not None
            assert self._child is not None
            pump = asyncio.create_task(self._pump(self._socket))
            try:
                await self._child.wait()
            finally:
                self._running = False
                pump.cancel()
            log.error("the engine process ended with code %s", self._child.returncode)
            self._fail_streams(_RESTARTING)
            await self._end_child()
            await self._relaunch()

    async def _relaunch(self) -> None:
        delay = 0.0
        while not self._running:
            now = time.monotonic()
            if len(self._crashes) == BREAKER_CRASHES and now - self._crashes[0] < BREAKER_WINDOW_S:
                delay = BREAKER_WINDOW_S
                log.error("the engine ended %d times in a row; the next start is in %.0f s", BREAKER_CRASHES, delay)
            self._crashes.append(now)
            await asyncio.sleep(delay)
            try:
                await self._launch()
                self.restarts += 1
            except EngineUnavailable as error:
                log.error("the engine could not be restarted: %s", error)
                delay = min(10.0, max(1.0, delay * 2))

    async def _pump(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            message = await self._receive(socket)
            self._heard = time.monotonic()
            if not isinstance(message, Step):
                continue
            if message.stats is not None:
                self.stats = message.stats
            for event in message.events:
                if event.reason in PINS_END_WITH:
                    self._pins.pop(event.program_id, None)
                self._on_event(event)
            for output in message.outputs:
                stream = self._streams.get(output.request_id)
                if stream is not None:
                    stream.put_nowait(output)

    def _fail_streams(self, error: RequestError) -> None:
        for request_id, stream in self._streams.items():
            stream.put_nowait(RequestOutput(request_id, finish_reason=FinishReason.ERROR, error=error))

    async def _end_child(self) -> None:
        self._running = False
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._child is not None and self._child.returncode is None:
            if self._child.stdin is not None:
                self._child.stdin.close()
            try:
                await asyncio.wait_for(self._child.wait(), 5)
            except TimeoutError:
                self._child.kill()
                await self._child.wait()
