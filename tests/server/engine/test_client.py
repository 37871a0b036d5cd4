"""The client over a real engine process: pins outlive the process, and what is refused is known."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import torch

from server.adapters.ir import LinearEdit, Program
from server.adapters.program_file import write_program
from server.engine.client import EngineClient
from server.engine.settings import EngineSettings
from server.engine.types import ProgramEvent, ProgramRef, ProgramState
from server.engine.wire import Pin, ToEngine, Unpin
from tests.conftest import TinyModels
from tests.harness import DIGEST, load_base_for_lowering


def test_pins_are_limited_by_bytes_and_by_number() -> None:
    settings = EngineSettings("", "", bank_bytes=100, max_slots=4)
    assert settings.pins_fit([])
    assert settings.pins_fit([20, 30])
    assert not settings.pins_fit([20, 31])
    assert not settings.pins_fit([1, 1, 1])


def test_what_is_let_go_while_a_new_process_is_told_of_the_pins_is_not_pinned() -> None:
    async def scenario() -> None:
        client = EngineClient(EngineSettings("", ""), on_event=lambda _: None)
        told: list[ToEngine] = []

        async def send(message: ToEngine) -> None:
            told.append(message)
            if message == Pin(ProgramRef("first")):
                await client.unpin_program("second")

        client._send = send  # type: ignore[method-assign]
        for name in ("first", "second", "third"):
            await client.pin_program(ProgramRef(name))
        assert told == []
        client._running = True
        await client._send_pins()
        assert told == [Pin(ProgramRef("first")), Unpin("second"), Pin(ProgramRef("third"))]
        client._running = False
        await client.stop()

    asyncio.run(scenario())


def test_pins_and_prefetches_through_the_process_and_its_death(tiny_models: TinyModels, tmp_path: Path) -> None:
    model = tiny_models("llama")
    refs = []
    for name in ("kept", "ahead", "beyond"):
        program = Program()
        for site in load_base_for_lowering(model).spec.sites:
            if site.kind == "linear":
                program.add(site.name, LinearEdit(down=torch.zeros(1, site.in_features), up=torch.zeros(1, site.out_features)))
        write_program(tmp_path / name, program, program_id=name, facts={})
        refs.append(ProgramRef(name, str(tmp_path / name)))
    kept, ahead, beyond = refs

    async def scenario() -> None:
        events: asyncio.Queue[ProgramEvent] = asyncio.Queue()

        async def until(name: str, state: ProgramState, reason: str = "") -> None:
            while True:
                event = await asyncio.wait_for(events.get(), 60)
                if (event.program_id, event.state, event.reason) == (name, state, reason):
                    return

        settings = EngineSettings(
            str(model), DIGEST, dtype="float32", kv_cache_bytes=1 << 20, bank_bytes=1 << 20, max_slots=3, threads=1
        )
        client = EngineClient(settings, on_event=events.put_nowait)
        assert not client.pins_fit([1, 1])
        await client.start()
        try:
            await client.load_program(ahead)
            await until("ahead", ProgramState.RESIDENT)
            await client.pin_program(kept)
            await until("kept", ProgramState.RESIDENT)
            await client.pin_program(beyond)
            await until("beyond", ProgramState.HOST, "pin_limit")
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
            await until("kept", ProgramState.RESIDENT)
            await client.unpin_program("kept")
            await client.drop_program("kept")
            await until("kept", ProgramState.STORED, "dropped")
        finally:
            await client.stop()

    asyncio.run(scenario())
