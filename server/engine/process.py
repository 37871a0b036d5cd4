"""The engine process: ``python -m server.engine.process``. Reads commands, steps the engine, sends what came of it.

Started by ``EngineClient`` with a Start message on standard input; ends when that pipe closes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
from pathlib import Path

import msgspec
import zmq

from server.engine.encoder_engine import EncoderEngine
from server.engine.engine import Engine
from server.engine.model import is_encoder
from server.engine.wire import Abort, Add, Drop, Fatal, FromEngine, Load, Pin, Ready, Start, Step, ToEngine, Unpin

STATS_INTERVAL_S = 0.25
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""From glibc's malloc.h."""

log = logging.getLogger(__name__)


class _Channel:
    """The socket to the parent, the pipe that tells of its end, and a pipe by which loader threads wake the loop."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._poller = zmq.Poller()
        for source in (self._socket, self._wake_read, sys.stdin.fileno()):
            self._poller.register(source, zmq.POLLIN)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)

    def send(self, message: FromEngine) -> None:
        self._socket.send(self._encoder.encode(message))

    def wake(self) -> None:
        try:
            os.write(self._wake_write, b"!")
        except BlockingIOError:
            return  # the pipe is full of wake-ups already

    def receive(self, timeout_ms: int) -> list[ToEngine] | None:
        """Commands that arrived, waiting up to ``timeout_ms`` for the first; None when the parent is gone."""
        ready = dict(self._poller.poll(timeout_ms))
        if sys.stdin.fileno() in ready:
            return None
        if self._wake_read in ready:
            os.read(self._wake_read, 4096)
        commands = []
        while True:
            try:
                commands.append(self._decoder.decode(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return commands


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="engine: %(levelname)s %(name)s: %(message)s")
    start = msgspec.json.decode(sys.stdin.buffer.readline(), type=Start)
    channel = _Channel(start.address)
    try:
        kind = EncoderEngine if is_encoder(Path(start.settings.model_dir)) else Engine
        engine = kind(start.settings, wake=channel.wake)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        log.exception("the engine cannot start")
        channel.send(Fatal(f"{type(error).__name__}: {error}"))
        time.sleep(0.5)  # let the message leave before the socket goes
        raise SystemExit(1) from error
    # Not before: loading leaves hundreds of megabytes behind.
    _keep_freed_memory()
    channel.send(Ready(engine.info))
    try:
        _serve(engine, channel)
    finally:
        engine.close()


def _keep_freed_memory() -> None:
    """Have glibc keep what a step frees for the next one. By default it gives large pieces back at once, and a prompt's step then begins with
    50,000 page faults."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # glibc's own
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def _serve(engine: Engine | EncoderEngine, channel: _Channel) -> None:
    stats_due = 0.0
    while True:
        commands = channel.receive(0 if engine.has_runnable else int(STATS_INTERVAL_S * 1000))
        if commands is None:
            return
        for command in commands:
            match command:
                case Add(request):
                    engine.add(request)
                case Abort(request_id):
                    engine.abort(request_id)
                case Drop(program_id):
                    engine.drop_program(program_id)
                case Pin(program):
                    engine.pin_program(program)
                case Unpin(program_id):
                    engine.unpin_program(program_id)
                case Load(program):
                    engine.load_program(program)
        outputs = engine.step()
        events = engine.take_events()
        now = time.monotonic()
        stats = engine.stats() if now >= stats_due else None
        if stats is not None:
            stats_due = now + STATS_INTERVAL_S
        if outputs or events or stats:
            channel.send(Step(outputs, events, stats))


if __name__ == "__main__":
    main()
