"""Two tenants of a live server for all tests of the client; each test finds them without adapters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from medley_client.cli import main
from medley_client.cli.console import err, out
from tests.conftest import TinyModels
from tests.live import TENANTS, Live, Sharing
from tests.parity.variants import VARIANTS, Variant, make_adapter

Command = Callable[..., tuple[int, str, str]]
_seeds = itertools.count(1)


@pytest.fixture(scope="package")
def server(sharing: Sharing) -> Live:
    return sharing()


@pytest.fixture
def live(server: Live) -> Iterator[Live]:
    """The server. What a test leaves there is removed; blobs stay the tenant's for a day."""
    yield server
    for tenant in TENANTS:
        with server.client(tenant) as client:
            for alias in client.aliases.list():
                client.aliases.delete(alias.name)
            for adapter in client.adapters.list():
                for tag in set(adapter.tags) - {"latest"}:
                    client.adapters.untag(adapter.name, tag)
                client.adapters.unpin(adapter.name)
                client.adapters.delete(adapter.name)


@pytest.fixture
def command(live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs ``medley`` as the tenant acme: (status, stdout, stderr)."""
    monkeypatch.setenv("MEDLEY_URL", live.url)
    monkeypatch.setenv("MEDLEY_API_KEY", live.keys["acme"])
    # The consoles are made on import, and keep what the terminal said then.
    monkeypatch.setattr(out, "width", 200)
    monkeypatch.setattr(err, "width", 200)

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


@pytest.fixture
def adapter(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose bytes the server has never seen."""
    return make_adapter(VARIANTS[0], "llama", tiny_models("llama"), tmp_path_factory.mktemp("a") / "my-bot", seed=next(_seeds))


@pytest.fixture
def large(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, of several pieces."""
    variant = Variant("large", {"r": 4096}, with_head=True)
    directory = tmp_path_factory.mktemp("a") / "large"
    return make_adapter(variant, "llama", tiny_models("llama"), directory, seed=next(_seeds), scale=0.01)
