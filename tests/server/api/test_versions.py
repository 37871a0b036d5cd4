"""Versions, tags, aliases, conditions and idempotency, as callers of the HTTP API meet them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from peft import LoraConfig

from tests.conftest import TinyModels
from tests.live import Live
from tests.parity.cases import Case, make_checkpoint

CASE = Case("law", lambda _: LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]), scale=0.5)
PROMPT = "One prompt for all"
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters that answer differently."""
    directory = tmp_path_factory.mktemp("adapters")
    return [make_checkpoint(CASE, "llama", model, directory / str(seed), seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def live(shared: Live) -> Live:
    return shared


@pytest.fixture
def http(live: Live) -> Iterator[httpx.Client]:
    with live.http() as client:
        yield client


def push(http: httpx.Client, directory: Path, name: str, headers: dict[str, str] | None = None, **fields: str) -> httpx.Response:
    parts: list[tuple[str, Any]] = [(field, (None, value)) for field, value in {"name": name, **fields}.items()]
    parts += [("files", (file, (directory / file).read_bytes())) for file in FILES]
    return http.post("/v1/adapters", files=parts, headers=headers)


def answer(http: httpx.Client, adapter: str, user: str | None = None) -> str:
    parameters = {"adapter_id": adapter, "max_new_tokens": 12, "ignore_eos_token": True, "user": user}
    reply = http.post("/generate", json={"inputs": PROMPT, "parameters": parameters})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["generated_text"])


def code(reply: httpx.Response) -> tuple[int, str]:
    error = reply.json()["error"]
    return reply.status_code, reply.json()["code"] if isinstance(error, str) else error["code"]


@pytest.fixture(scope="module")
def texts(live: Live, adapters: list[Path]) -> list[str]:
    """What each of them answers."""
    with live.http() as http:
        found = []
        for number, adapter in enumerate(adapters):
            assert push(http, adapter, f"solo-{number}").status_code == 201
            found.append(answer(http, f"solo-{number}"))
    assert len(set(found)) == 3
    return found


def test_tags_move_and_roll_back(http: httpx.Client, adapters: list[Path], texts: list[str]) -> None:
    assert push(http, adapters[0], "bot").json()["version"] == "v1"
    assert push(http, adapters[1], "bot").json()["version"] == "v2"
    assert answer(http, "bot") == texts[1]
    assert push(http, adapters[2], "bot", tag="next").json()["version"] == "v3"
    assert (answer(http, "bot"), answer(http, "bot@next")) == (texts[1], texts[2])
    moved = http.put("/v1/adapters/bot/tags/latest", json={"version": "v1"})
    assert moved.json()["tags"] == {"latest": "v1", "next": "v3"}
    assert answer(http, "bot") == texts[0]
    shown = http.get("/v1/adapters/bot").json()
    assert (shown["version"], shown["tags"]) == ("v1", {"latest": "v1", "next": "v3"})
    assert [(item["version"], item["tags"]) for item in shown["versions"]] == [("v3", ["next"]), ("v2", []), ("v1", ["latest"])]
    assert answer(http, f"bot@{shown['versions'][1]['digest'][:30]}") == texts[1]
    assert code(http.delete("/v1/adapters/bot@v3")) == (409, "version_in_use")
    assert http.delete("/v1/adapters/bot/tags/next").status_code == 200
    assert http.delete("/v1/adapters/bot@v3").status_code == 200
    assert code(http.post("/generate", json={"inputs": "x", "parameters": {"adapter_id": "bot@next"}})) == (
        404,
        "adapter_not_found",
    )
    for tag, version, expected in (
        ("latest", "v9", (404, "adapter_not_found")),
        ("v1", "v1", (400, "invalid_adapter_name")),
        ("UPPER", "v1", (400, "invalid_adapter_name")),
    ):
        assert code(http.put(f"/v1/adapters/bot/tags/{tag}", json={"version": version})) == expected
    assert http.delete("/v1/adapters/bot/tags/latest").status_code in (400, 409), "the bare name must mean something"


def test_an_alias_gives_a_user_always_the_same(http: httpx.Client, adapters: list[Path], texts: list[str]) -> None:
    push(http, adapters[0], "calm")
    push(http, adapters[1], "bold")
    targets = [{"adapter": "calm", "weight": 3}, {"adapter": "bold@v1", "weight": 1}]
    made = http.put("/v1/aliases/live", json={"targets": targets})
    assert made.json()["targets"] == [{"adapter": "calm", "weight": 3.0}, {"adapter": "bold@v1", "weight": 1.0}]
    first = [answer(http, "live", f"user-{number}") for number in range(24)]
    assert first == [answer(http, "live", f"user-{number}") for number in range(24)]
    assert set(first) == {texts[0], texts[1]}
    assert Counter(first)[texts[0]] > Counter(first)[texts[1]]
    chat = {"model": "live", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "user": "user-3"}
    assert http.post("/v1/completions", json=chat).json()["choices"][0]["text"] == first[3]
    assert "live" in [item["id"] for item in http.get("/v1/models").json()["data"]]
    assert http.get("/v1/models/live").status_code == 200
    assert http.put("/v1/aliases/live", json={"targets": [{"adapter": "bold"}]}).status_code == 200
    assert {answer(http, "live", f"user-{number}") for number in range(6)} == {texts[1]}
    assert "live" in [item["name"] for item in http.get("/v1/aliases").json()["data"]]
    assert code(push(http, adapters[2], "live")) == (409, "name_taken")
    assert code(http.put("/v1/aliases/calm", json={"targets": [{"adapter": "bold"}]})) == (409, "name_taken")
    assert code(http.put("/v1/aliases/other", json={"targets": [{"adapter": "absent"}]})) == (404, "adapter_not_found")
    assert code(http.delete("/v1/adapters/bold")) == (409, "version_in_use")
    assert http.delete("/v1/aliases/live").status_code == 200
    assert http.delete("/v1/adapters/bold").status_code == 200
    assert code(http.get("/v1/aliases/live")) == (404, "adapter_not_found")


def test_another_tenants_names_do_not_exist(live: Live, http: httpx.Client, adapters: list[Path]) -> None:
    push(http, adapters[0], "mine")
    http.put("/v1/aliases/mine-live", json={"targets": [{"adapter": "mine"}]})
    with live.http("globex") as other:
        for method, mine, absent, body in (
            ("GET", "/v1/adapters/mine", "/v1/adapters/none", None),
            ("GET", "/v1/adapters/mine/files", "/v1/adapters/none/files", None),
            ("GET", "/v1/adapters/mine/tags", "/v1/adapters/none/tags", None),
            ("PUT", "/v1/adapters/mine/tags/x", "/v1/adapters/none/tags/x", {"version": "v1"}),
            ("DELETE", "/v1/adapters/mine/tags/next", "/v1/adapters/none/tags/next", None),
            ("POST", "/v1/adapters/mine/load", "/v1/adapters/none/load", None),
            ("POST", "/v1/adapters/mine/pin", "/v1/adapters/none/pin", None),
            ("DELETE", "/v1/adapters/mine/pin", "/v1/adapters/none/pin", None),
            ("DELETE", "/v1/adapters/mine", "/v1/adapters/none", None),
            ("GET", "/v1/aliases/mine-live", "/v1/aliases/none-live", None),
            ("DELETE", "/v1/aliases/mine-live", "/v1/aliases/none-live", None),
        ):
            replies = [other.request(method, path, json=body) for path in (mine, absent)]
            assert [reply.status_code for reply in replies] == [404, 404], (method, mine)
            assert replies[0].text.replace("mine", "none") == replies[1].text
    assert http.get("/v1/aliases/mine-live").status_code == 200


def test_writes_happen_only_under_their_condition(http: httpx.Client, adapters: list[Path]) -> None:
    new = {"if-none-match": "*"}
    assert push(http, adapters[0], "guarded", new).status_code == 201
    assert code(push(http, adapters[1], "guarded", new)) == (412, "precondition_failed")
    etag = http.get("/v1/adapters/guarded").headers["etag"]
    assert http.get("/v1/adapters/guarded", headers={"if-none-match": etag}).status_code == 304
    assert push(http, adapters[1], "guarded", {"if-match": etag}).status_code == 201
    assert code(push(http, adapters[2], "guarded", {"if-match": etag})) == (412, "precondition_failed")
    assert code(http.put("/v1/adapters/guarded/tags/latest", json={"version": "v1"}, headers={"if-match": etag})) == (
        412,
        "precondition_failed",
    )
    assert code(http.delete("/v1/adapters/guarded", headers={"if-match": etag})) == (412, "precondition_failed")
    fresh = http.get("/v1/adapters/guarded").headers["etag"]
    assert fresh != etag
    moved = http.put("/v1/adapters/guarded/tags/latest", json={"version": "v1"}, headers={"if-match": fresh})
    assert moved.status_code == 200
    assert push(http, adapters[1], "guarded", {"if-match": "*"}).status_code == 201
    assert code(push(http, adapters[1], "unguarded", {"if-match": "*"})) == (412, "precondition_failed")
    etag = http.get("/v1/adapters/guarded").headers["etag"]
    assert http.delete("/v1/adapters/guarded", headers={"if-match": etag}).status_code == 200
    for headers in (
        {"if-match": "bare"},
        {"if-match": '"a", "b"'},
        {"if-none-match": '"x"'},
        {"if-match": '"a"', "if-none-match": "*"},
    ):
        assert code(push(http, adapters[0], "guarded", headers)) == (400, "invalid_request"), headers


def test_a_repeated_push_gets_its_first_reply(http: httpx.Client, adapters: list[Path]) -> None:
    key = {"idempotency-key": "push-1"}
    first = push(http, adapters[0], "once", key)
    again = push(http, adapters[0], "once", key)
    assert (first.status_code, again.status_code, again.json()) == (201, 201, first.json())
    assert (first.headers.get("idempotent-replayed"), again.headers.get("idempotent-replayed")) == (None, "true")
    push(http, adapters[1], "once")
    assert push(http, adapters[0], "once", key).json()["version"] == "v1"
    assert http.get("/v1/adapters/once").json()["version"] == "v2", "a repeated request changes nothing"
    assert code(push(http, adapters[1], "once", key)) == (422, "idempotency_key_reused")
    assert code(push(http, adapters[0], "other", key)) == (422, "idempotency_key_reused")
    assert code(push(http, adapters[0], "once", {"idempotency-key": "two words"})) == (
        400,
        "invalid_request",
    )
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda _: push(http, adapters[2], "racing", {"idempotency-key": "push-2"}), range(8)))
    assert {reply.status_code for reply in replies} <= {201, 409}
    assert {reply.json()["version"] for reply in replies if reply.status_code == 201} == {"v1"}
    assert {code(reply) for reply in replies if reply.status_code == 409} <= {(409, "idempotency_key_in_use")}
