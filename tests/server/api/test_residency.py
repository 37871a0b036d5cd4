"""Loading ahead, pinning, and what is told of an adapter; on a server whose bank holds few."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from peft import LoraConfig

from tests.conftest import TinyModels
from tests.live import Live, live_server, wait_for
from tests.parity.cases import Case, make_checkpoint
from tests.server.api.test_versions import answer, code, push

CASE = Case("law", lambda _: LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]), scale=0.5)
HELD = 4
"""Adapters that the bank holds; half of it may be pinned."""


@pytest.fixture(scope="module")
def adapters(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return [make_checkpoint(CASE, "llama", tiny_models("llama"), directory / str(seed), seed=seed) for seed in range(8)]


@pytest.fixture(scope="module")
def program_bytes(shared: Live, adapters: list[Path]) -> int:
    """What one of them takes on the device."""
    with shared.http() as http:
        return int(push(http, adapters[0], "probe").json()["facts"]["program_bytes"])


@contextmanager
def started(model: Path, data_dir: Path, program_bytes: int) -> Iterator[Live]:
    """A server on the data of this module."""
    with live_server(model, data_dir, "--bank-bytes", str(program_bytes * (2 * HELD + 1) // 2)) as server:
        yield server


@pytest.fixture(scope="module")
def data_dir(tiny_models: TinyModels, adapters: list[Path], program_bytes: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a server that had the adapters pushed, one used and two pinned, and was stopped."""
    directory = tmp_path_factory.mktemp("live")
    with started(tiny_models("llama"), directory, program_bytes) as server, server.http() as http:
        for number, adapter in enumerate(adapters):
            assert push(http, adapter, f"a{number}").status_code == 201
        before = shown(http, "a0")
        assert (before["residency"], before["load_seconds"], before["pinned"], before["quarantine"]) == ({}, {}, False, None)
        answer(http, "a0")
        wait_for(lambda: states(http, "a0") == {"resident"})
        after = shown(http, "a0")
        assert after["load_seconds"].keys() == {"host", "resident"}
        assert abs(after["last_used"] - time.time()) < 60
        pinned = http.post("/v1/adapters/a2/pin")
        assert (pinned.status_code, pinned.json()["pinned"]) == (200, True)
        assert http.post("/v1/adapters/a3@v1/pin").status_code == 200
        wait_for(lambda: states(http, "a2") == states(http, "a3") == {"resident"})
    return directory


@pytest.fixture(scope="module")
def live(tiny_models: TinyModels, data_dir: Path, program_bytes: int) -> Iterator[Live]:
    """Started on what the one before left."""
    with started(tiny_models("llama"), data_dir, program_bytes) as server:
        yield server


def shown(http: httpx.Client, name: str) -> dict[str, Any]:
    return dict(http.get(f"/v1/adapters/{name}").json())


def states(http: httpx.Client, name: str) -> set[str]:
    return set(shown(http, name)["residency"].values())


def test_what_is_told_of_an_adapter_outlives_the_server(live: Live) -> None:
    with live.http() as http:
        found = shown(http, "a0")
        assert 0 < time.time() - found["last_used"] < 600
        assert shown(http, "a7")["last_used"] is None
        facts = found["facts"]
        assert (facts["method"], facts["rank"], facts["modules"]) == ("LORA", 4, ["down_proj", "q_proj"])
        assert found["files"][0].keys() == {"name", "digest", "bytes"}
        assert (found["tags"], found["versions"][0]["tags"]) == ({"latest": "v1"}, ["latest"])


def test_another_tenant_does_not_learn_what_is_loaded(live: Live, adapters: list[Path]) -> None:
    with live.http("globex") as http:
        assert push(http, adapters[2], "copy").status_code == 201
        found = shown(http, "copy")
        assert (found["residency"], found["load_seconds"], found["last_used"], found["pinned"]) == ({}, {}, None, False)
        assert http.delete("/v1/adapters/copy").status_code == 200


def test_loading_ahead(live: Live) -> None:
    with live.http() as http:
        assert http.post("/v1/adapters/a1/load").status_code == 202
        wait_for(lambda: states(http, "a1") <= {"host", "resident"} and bool(states(http, "a1")))
        assert shown(http, "a1")["last_used"] is None, "nobody used it"


def test_what_is_pinned_stays(live: Live) -> None:
    with live.http() as http:
        wait_for(lambda: states(http, "a2") == states(http, "a3") == {"resident"})
        refused = http.post("/v1/adapters/a4/pin")
        assert code(refused) == (409, "pin_limit")
        assert not shown(http, "a4")["pinned"], "what was refused is not pinned"
        for name in ("a4", "a5", "a6", "a7", "a0"):
            answer(http, name)
        assert states(http, "a2") == states(http, "a3") == {"resident"}


def test_pins_are_kept_and_taken_back(live: Live) -> None:
    with live.http() as http:
        wait_for(lambda: states(http, "a2") == states(http, "a3") == {"resident"})
        engine = live.child("server.engine.process")
        engine.kill()
        wait_for(lambda: http.get("/readyz").status_code == 503)
        wait_for(lambda: http.get("/readyz").status_code == 200)
        wait_for(lambda: states(http, "a2") == states(http, "a3") == {"resident"})
        assert http.delete("/v1/adapters/a3/pin").json()["pinned"] is False
        assert http.post("/v1/adapters/a4/pin").status_code == 200
        assert http.delete("/v1/adapters/a2").status_code == 200
        wait_for(lambda: http.post("/v1/adapters/a3/pin").status_code == 200)
        wait_for(lambda: states(http, "a3") == states(http, "a4") == {"resident"})
        for name in ("a5", "a6", "a7", "a0"):
            answer(http, name)
        assert states(http, "a3") == states(http, "a4") == {"resident"}
