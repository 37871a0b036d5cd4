"""The messages between the HTTP process and the engine process: msgspec structs over the engine's own types. Never pickle."""

from __future__ import annotations

import msgspec

from server.engine.settings import EngineSettings
from server.engine.types import EngineInfo, EngineStats, ProgramEvent, ProgramRef, Request, RequestOutput


class Start(msgspec.Struct, frozen=True):
    """The first line on the child's standard input. The pipe stays open: its end means that the parent is gone."""

    address: str
    settings: EngineSettings


class Add(msgspec.Struct, tag=True, frozen=True):
    request: Request


class Abort(msgspec.Struct, tag=True, frozen=True):
    request_id: str


class Drop(msgspec.Struct, tag=True, frozen=True):
    program_id: str


class Pin(msgspec.Struct, tag=True, frozen=True):
    """Keep a program on the device. Refused by an event with the reason ``pin_limit`` or ``load_failed``."""

    program: ProgramRef


class Unpin(msgspec.Struct, tag=True, frozen=True):
    program_id: str


class Load(msgspec.Struct, tag=True, frozen=True):
    """Bring a program to where it is quickly at hand, though nobody has asked for it yet."""

    program: ProgramRef


class Ready(msgspec.Struct, tag=True, frozen=True):
    info: EngineInfo


class Step(msgspec.Struct, tag=True, frozen=True):
    """What happened since the last message; ``stats`` comes a few times a second, also when nothing happens."""

    outputs: list[RequestOutput] = []
    events: list[ProgramEvent] = []
    stats: EngineStats | None = None


class Fatal(msgspec.Struct, tag=True, frozen=True):
    """The engine cannot start; the message says why."""

    message: str


ToEngine = Add | Abort | Drop | Pin | Unpin | Load
FromEngine = Ready | Step | Fatal
