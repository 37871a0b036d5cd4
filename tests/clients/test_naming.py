"""Versions, tags, aliases, conditions and pins, through the clients and the command, against a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from medley_client import ApiError, AsyncMedley, Medley
from tests.clients.conftest import Command
from tests.conftest import TinyModels
from tests.live import Live
from tests.parity.variants import VARIANTS, make_adapter


@pytest.fixture(scope="module")
def versions(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters that make different texts."""
    directory = tmp_path_factory.mktemp("a")
    return [
        make_adapter(VARIANTS[0], "llama", tiny_models("llama"), directory / f"bot-{seed}", seed=seed, scale=0.4)
        for seed in (1, 2, 3)
    ]


@pytest.fixture
def client(live: Live, versions: list[Path]) -> Iterator[Medley]:
    """A client, with an adapter ``bot`` of two versions on the server."""
    with live.client() as client:
        for path in versions[:2]:
            client.adapters.push(path, "bot")
        yield client


def said(client: Medley, adapter: str, user: str | None = None) -> str:
    return client.generate("Hello", adapter=adapter, user=user, max_new_tokens=8, ignore_eos_token=True).text


def refused(call: Callable[[], object]) -> str:
    """The code with which the server refuses."""
    with pytest.raises(ApiError) as caught:
        call()
    return caught.value.code


def test_tags_and_rollback(client: Medley, versions: list[Path]) -> None:
    assert client.adapters.tag("bot", "stable", "v1") == {"latest": "v2", "stable": "v1"}
    shown = client.adapters.show("bot")
    assert (shown.version, shown.tags) == ("v2", {"latest": "v2", "stable": "v1"})
    assert [item.tags for item in shown.versions] == [{"latest": "v2"}, {"stable": "v1"}]
    old, new = said(client, "bot@stable"), said(client, "bot")
    assert old == said(client, "bot@v1") != new
    assert client.adapters.rollback("bot") == "v1"
    assert said(client, "bot") == old
    assert client.adapters.rollback("bot", "v2") == "v2"
    assert said(client, "bot") == new
    candidate = client.adapters.push(versions[2], "bot", tag="candidate")
    assert (candidate.version, client.adapters.tags("bot")["latest"]) == ("v3", "v2")
    assert refused(lambda: client.adapters.delete("bot@v1")) == "version_in_use"
    client.adapters.untag("bot", "stable")
    assert client.adapters.delete("bot@v1") == 1


def test_an_alias_gives_a_user_always_the_same(client: Medley) -> None:
    alias = client.aliases.set("support", {"bot@v1": 60, "bot@v2": 40}, create=True)
    assert [(target.adapter, target.weight) for target in alias.targets] == [("bot@v1", 60), ("bot@v2", 40)]
    texts = {said(client, "bot@v1"), said(client, "bot@v2")}
    chosen = {user: said(client, "support", user) for user in map(str, range(12))}
    assert set(chosen.values()) == texts
    assert all(said(client, "support", user) == text for user, text in chosen.items())
    assert refused(lambda: client.aliases.set("support", "bot@v2", create=True)) == "precondition_failed"
    client.aliases.set("support", "bot@v2", if_match=alias.etag)
    assert said(client, "support") == said(client, "bot@v2")
    assert refused(lambda: client.aliases.set("support", "bot@v1", if_match=alias.etag)) == "precondition_failed"
    assert client.aliases.list() == [client.aliases.show("support")]
    client.aliases.delete("support")
    assert client.aliases.list() == []


def test_conditions_of_a_push(client: Medley, versions: list[Path]) -> None:
    etag = client.adapters.show("bot").etag
    assert refused(lambda: client.adapters.push(versions[2], "bot", create=True)) == "precondition_failed"
    assert client.adapters.push(versions[2], "bot", if_match=etag).version == "v3"
    assert refused(lambda: client.adapters.push(versions[0], "bot", if_match=etag)) == "precondition_failed"
    assert client.adapters.push(versions[2], "new", create=True).version == "v1"


def test_the_same_key_gives_the_same_reply(client: Medley, versions: list[Path]) -> None:
    first = client.adapters.push(versions[2], "bot", idempotency_key="once")
    client.adapters.rollback("bot", "v1")
    assert client.adapters.push(versions[2], "bot", idempotency_key="once") == first
    assert client.adapters.tags("bot")["latest"] == "v1"
    reused = refused(lambda: client.adapters.push(versions[1], "bot", idempotency_key="once"))
    assert reused == "idempotency_key_reused"


def test_load_and_pin(client: Medley) -> None:
    assert client.adapters.load("bot@v1").version == "v1"
    pinned = client.adapters.pin("bot")
    assert pinned.pinned
    assert client.adapters.show("bot").pinned
    said(client, "bot")
    shown = client.adapters.show("bot")
    assert set(shown.residency.values()) == {"resident"}
    assert shown.load_seconds["resident"] > 0
    assert shown.last_used is not None
    assert not client.adapters.unpin("bot").pinned


def test_the_async_twin(client: Medley, live: Live) -> None:
    async def use() -> None:
        async with AsyncMedley(live.url, live.keys["acme"]) as twin:
            assert await twin.adapters.tag("bot", "stable", "v1") == await twin.adapters.tags("bot")
            await twin.adapters.untag("bot", "stable")
            assert await twin.adapters.rollback("bot") == "v1"
            alias = await twin.aliases.set("support", "bot@v2")
            assert [alias] == await twin.aliases.list() == [await twin.aliases.show("support")]
            await twin.aliases.delete("support", if_match=alias.etag)
            assert (await twin.adapters.load("bot")).version == "v1"
            assert (await twin.adapters.pin("bot")).pinned
            assert not (await twin.adapters.unpin("bot")).pinned

    asyncio.run(use())


@pytest.mark.usefixtures("client")
def test_names_on_the_command_line(command: Command, versions: list[Path]) -> None:
    assert command("tag", "bot@v1", "stable")[:2] == (0, "bot@stable is v1\n")
    assert command("rollback", "bot")[:2] == (0, "bot is v1 now\n")
    assert command("push", str(versions[2]), "--name", "bot", "--tag", "candidate", "--no-resume")[1].startswith("bot@v3")
    listed = command("ls")[1]
    assert "candidate=v3, stable=v1" in listed
    assert "never" in listed
    shown = command("show", "bot")[1]
    assert "latest, stable)" in shown
    etag = json.loads(command("show", "bot", "--json")[1])["etag"]
    assert f"etag       {etag}\n" in shown
    assert command("tag", "bot@v3", "stable", "--if-match", etag)[0] == 0
    status, _, err = command("push", str(versions[2]), "--name", "bot", "--if-match", etag)
    assert status == 1
    assert "medley show" in err
    assert command("push", str(versions[2]), "--name", "bot", "--create")[0] == 1
    assert "NAME@" not in command("tag", "bot", "stable")[2]
    assert "bot@v2" in command("tag", "bot", "stable")[2]
    assert json.loads(command("untag", "bot", "stable", "--json")[1]) == {"name": "bot", "untagged": "stable"}
    assert command("untag", "bot", "candidate")[0] == 0


@pytest.mark.usefixtures("client")
def test_aliases_on_the_command_line(command: Command) -> None:
    assert "no aliases yet" in command("aliases")[1]
    assert command("alias", "support", "bot@v1:90", "bot@v2:10")[:2] == (0, "support is bot@v1 90%, bot@v2 10%\n")
    assert "bot@v1 90%" in command("aliases")[1]
    assert command("generate", "Hello", "--adapter", "support", "--user", "anna", "--max-new-tokens", "3")[0] == 0
    status, _, err = command("rm", "bot@v1")
    assert status == 1
    assert "medley alias" in err
    assert json.loads(command("alias", "support", "--json")[1])["targets"][0] == {"adapter": "bot@v1", "weight": 90.0}
    assert command("alias", "support", "bot@v1:much")[0] == 1
    assert command("alias", "support", "bot", "--rm")[0] == 1
    assert command("alias", "support", "--rm")[:2] == (0, "there is no alias support any more\n")


@pytest.mark.usefixtures("client")
def test_pull_load_and_pin_on_the_command_line(
    command: Command, versions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, _ = command("pull", "bot@v1")
    assert status == 0
    assert out.startswith("bot@v1  2 files, ")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "bot" / file).read_bytes() == (versions[0] / file).read_bytes()
    status, _, err = command("pull", "bot@v2", "bot")
    assert status == 1
    assert "other content" in err
    assert json.loads(command("pull", "bot@v2", "bot", "--overwrite", "--json")[1])["version"] == "v2"
    assert "bot@v2" in command("load", "bot")[1]
    assert "pinned" in command("pin", "bot")[1]
    assert "pinned     yes" in command("show", "bot")[1]
    assert "pinned" not in command("unpin", "bot")[1]
