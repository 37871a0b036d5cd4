"""Pushing and pulling against a real server, over connections that break and by processes that die."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from medley_client import ApiError, AsyncMedley, Medley, MedleyError
from medley_client.push import PIECE
from tests.clients.proxy import Proxy, proxy
from tests.live import Live
from tests.parity.golden import GOLDEN

CASES = GOLDEN / "cases"
REQUESTS = 8 << 10
"""More bytes than a push without content sends."""


@pytest.fixture
def through(live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A proxy in front of the server, and a cache directory of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with proxy(live.url) as running:
        yield running


def weights(directory: Path) -> int:
    return (directory / "adapter_model.safetensors").stat().st_size


def test_the_same_bytes_are_not_sent_again(live: Live, adapter: Path, through: Proxy) -> None:
    with Medley(through.url, live.keys["acme"]) as client:
        first = client.adapters.push(adapter, "bot")
        assert through.sent > weights(adapter)
        before = through.sent
        assert client.adapters.push(adapter, "bot") == first
        other_name = client.adapters.push(adapter, "bot-two")
        assert through.sent - before < REQUESTS
        assert other_name.digest == first.digest
    with Medley(through.url, live.keys["globex"]) as client:
        before = through.sent
        client.adapters.push(adapter, "bot")
        assert through.sent - before > weights(adapter), "what others have is nobody's business"


def test_a_killed_push_resumes_in_another_process(live: Live, large: Path, through: Proxy) -> None:
    size = weights(large)
    assert size > 2 * PIECE
    environment = {**os.environ, "MEDLEY_URL": through.url, "MEDLEY_API_KEY": live.keys["acme"]}
    command = [sys.executable, "-m", "medley_client.cli", "push", str(large), "--json"]
    killed = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    through.at(size // 2, killed.kill)
    assert killed.wait(60) == -signal.SIGKILL
    before = through.sent
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    assert through.sent - before <= size / 2 + PIECE
    with live.client() as client:
        assert client.adapters.show("large").files[1].nbytes == size


def test_a_broken_connection_costs_less_than_a_piece(live: Live, large: Path, through: Proxy) -> None:
    size = weights(large)
    with Medley(through.url, live.keys["globex"]) as client:
        through.at(size // 2, through.cut)
        client.adapters.push(large, "large")
        assert size < through.sent < size + PIECE


@pytest.mark.parametrize("case", ["lora", "double_seq_bn", "fusion"])
def test_a_pull_gives_back_what_was_pushed(case: str, live: Live, adapter: Path, tmp_path: Path) -> None:
    source = adapter if case == "lora" else CASES / f"llama-{case}"
    name = case.replace("_", "-")
    children = sorted((source / "children").glob("*"))
    with live.client() as client:
        for child in children:
            client.adapters.push(child, child.name)
        pushed = client.adapters.push(source, name)
        pulled = client.adapters.pull(f"{name}@v1", tmp_path / name)
        assert {file.name for file in pulled.files} == {file.name for file in pushed.files}
        for file in pulled.files:
            uploaded = source / "children" / file.name if "/" in file.name else source / file.name
            assert (tmp_path / name / file.name).read_bytes() == uploaded.read_bytes()
        assert len({file.name.partition("/")[0] for file in pulled.files if "/" in file.name}) == len(children)
        assert client.adapters.push(tmp_path / name, name).version == "v1"


def test_a_pull_refuses_to_replace_other_content(live: Live, adapter: Path, tmp_path: Path) -> None:
    with live.client() as client:
        client.adapters.push(adapter, "kept")
        client.adapters.pull("kept", tmp_path)
        config = tmp_path / "adapter_config.json"
        config.write_bytes(b"{}")
        with pytest.raises(MedleyError, match=r"other content in adapter_config\.json"):
            client.adapters.pull("kept", tmp_path)
        client.adapters.pull("kept", tmp_path, overwrite=True)
        assert config.read_bytes() == (adapter / "adapter_config.json").read_bytes()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        client.adapters.delete("kept")
        with pytest.raises(ApiError, match="kept"):
            client.adapters.pull("kept", tmp_path)


def test_the_async_twin_pushes_and_pulls(live: Live, large: Path, through: Proxy, tmp_path: Path) -> None:
    async def use() -> None:
        async with AsyncMedley(through.url, live.keys["acme"]) as client:
            through.at(weights(large) // 2, through.cut)
            await client.adapters.push(large, "async")
            pulled = await client.adapters.pull("async", tmp_path / "pulled")
            assert [file.name for file in pulled.files] == ["adapter_config.json", "adapter_model.safetensors"]

    asyncio.run(use())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "pulled" / name).read_bytes() == (large / name).read_bytes()
