"""What the client asks for, request by request, without a server."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import pytest

from medley_client import adapter_flows, alias_flows
from medley_client.errors import ApiError, CannotConnect, ConnectionBroke, MedleyError
from medley_client.flow import Call, Done, Flow, Pause, Reply, Work, advance, head, request
from medley_client.pull import pull
from medley_client.push import PIECE, Push, push
from medley_client.remembered import KEPT_S, RememberedUploads

T = TypeVar("T")
ADAPTER = {"name": "bot", "version": "v3", "digest": "sha256:00", "created": 1, "bytes": 2}


def reply(body: Any = None, status: int = 200, **headers: str) -> Reply:
    return Reply(status, {name.replace("_", "-"): value for name, value in headers.items()}, json.dumps(body).encode())


def refusal(status: int, code: str = "", **headers: str) -> Reply:
    return reply({"error": {"message": "no", "code": code}}, status, x_should_retry="false", **headers)


def play(flow: Flow[T], *outcomes: Reply | MedleyError) -> tuple[T, list[Call]]:
    """Give a flow these outcomes, one for each of its calls. Returns its result and the calls."""
    calls: list[Call] = []
    left = list(outcomes)
    outcome: Any = None
    while True:
        step = advance(flow, outcome)
        if isinstance(step, Done):
            assert not left
            return step.value, calls
        if isinstance(step, Call):
            calls.append(step)
            outcome = left.pop(0)
            if step.sink is not None and isinstance(outcome, Reply) and outcome.status < 400:
                step.sink.begin()
                step.sink.write(outcome.content)
        else:
            outcome = step.run() if isinstance(step, Work) else None


def lines(calls: list[Call]) -> list[str]:
    return [f"{call.method} {call.path}" for call in calls]


@pytest.mark.parametrize(
    ("call", "outcomes", "works"),
    [
        (Call("GET", "/x"), [ConnectionBroke("broke"), reply(1)], True),
        (Call("GET", "/x"), [ConnectionBroke("broke")] * 3, False),
        (Call("GET", "/x"), [CannotConnect("nobody")], False),
        (Call("POST", "/x"), [ConnectionBroke("broke")], False),
        (Call("POST", "/x", headers={"idempotency-key": "k"}), [ConnectionBroke("broke"), reply(1)], True),
        (Call("POST", "/x"), [reply(status=503), reply(1)], True),
        (Call("POST", "/x"), [reply(status=409, x_should_retry="true", retry_after_ms="1"), reply(1)], True),
        (Call("POST", "/x"), [reply(status=409)], False),
    ],
)
def test_what_is_tried_again(call: Call, outcomes: list[Reply | MedleyError], works: bool) -> None:
    if works:
        assert play(request(call), *outcomes)[0] == 1
    else:
        with pytest.raises(MedleyError):
            play(request(call), *outcomes)


def test_head_says_that_nothing_is_there_and_names_other_errors() -> None:
    assert play(head("/x"), Reply(404, {}))[0] is None
    with pytest.raises(ApiError, match="401 Unauthorized"):
        play(head("/x"), Reply(401, {}))


def test_unknown_fields_and_missing_ones_break_nothing() -> None:
    body = {
        **ADAPTER,
        "brand_new": {"a": 1},
        "tags": {"latest": "v3", "old": "v1"},
        "versions": [{**ADAPTER, "tags": ["latest"], "more": 1}, {**ADAPTER, "version": "v1", "tags": ["old"]}],
    }
    adapter = adapter_flows.read_adapter(body)
    assert adapter.tags == {"latest": "v3", "old": "v1"}
    assert [item.tags for item in adapter.versions] == [{"latest": "v3"}, {"old": "v1"}]
    assert adapter_flows.read_adapter(ADAPTER).files == ()
    assert alias_flows.read_alias({"name": "a", "targets": [{"adapter": "b", "weight": 2, "x": 1}], "y": 2}).etag == ""


def test_conditions_go_into_headers() -> None:
    _, calls = play(adapter_flows.tag("bot", "stable", "v2", "abc"), reply({"tags": {"stable": "v2"}}))
    assert (calls[0].method, calls[0].path, calls[0].headers) == ("PUT", "/v1/adapters/bot/tags/stable", {"if-match": '"abc"'})
    _, calls = play(alias_flows.put("a", "bot@v2", None, True), reply({"name": "a", "targets": []}))
    assert calls[0].headers == {"if-none-match": "*"}
    assert calls[0].json == {"targets": [{"adapter": "bot@v2", "weight": 1.0}]}
    with pytest.raises(MedleyError, match="one of them"):
        play(alias_flows.put("a", "bot", "abc", True))


def test_names_cannot_leave_their_place_in_a_path() -> None:
    _, calls = play(adapter_flows.show("a?b#c d"), reply(ADAPTER))
    assert calls[0].path == "/v1/adapters/a%3Fb%23c%20d"


def test_rollback_goes_to_the_version_before_and_only_if_nothing_moved() -> None:
    versions = [{**ADAPTER, "version": f"v{number}"} for number in (4, 3, 1)]
    shown = reply({**ADAPTER, "etag": "e", "versions": versions})
    version, calls = play(adapter_flows.rollback("bot", None), shown, reply({"tags": {"latest": "v1"}}))
    assert (version, calls[1].json, calls[1].headers) == ("v1", {"version": "v1"}, {"if-match": '"e"'})
    with pytest.raises(MedleyError, match="no version before"):
        play(adapter_flows.rollback("bot", None), reply({**ADAPTER, "versions": versions[:2]}))


KNOWN, UNKNOWN = Reply(200, {}), Reply(404, {})
BEGUN = reply({"id": "u"}, 201)
PUSHED = reply({**ADAPTER, "skipped": []}, 201)
WEIGHTS_BYTES = PIECE * 5 // 2


def at(offset: int) -> Reply:
    """Where an upload is."""
    return Reply(204, {"upload-offset": str(offset)})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Files that only look like an adapter: a config, and weights of two and a half pieces."""
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * WEIGHTS_BYTES)
    return tmp_path


def test_a_push_of_known_bytes_sends_none(adapter: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    wanted = Push(adapter, "bot", tag="beta", create=True, progress=lambda *state: seen.append(state))
    _, calls = play(push(wanted), KNOWN, KNOWN, PUSHED)
    assert [line.partition(" /v1/")[0] for line in lines(calls)] == ["HEAD", "HEAD", "POST"]
    assert all(call.body is None for call in calls)
    manifest = calls[-1].json
    assert (manifest["name"], manifest["tag"]) == ("bot", "beta")
    assert manifest["files"]["adapter_config.json"] == f"sha256:{hashlib.sha256(b'{}').hexdigest()}"
    assert calls[-1].headers["if-none-match"] == "*"
    assert len(calls[-1].headers["idempotency-key"]) == 32
    assert {what: state for what, *state in seen} == {what: [2 + WEIGHTS_BYTES] * 2 for what in ("hashing", "sending")}


def pieces(calls: list[Call]) -> list[tuple[str, int]]:
    """(Upload-Offset, bytes) of every piece that was sent."""
    return [(call.headers["upload-offset"], sum(map(len, call.body or ()))) for call in calls if call.method == "PATCH"]


def test_a_broken_piece_goes_on_from_where_the_server_is(adapter: Path) -> None:
    outcomes = [KNOWN, UNKNOWN, BEGUN, at(PIECE), ConnectionBroke("broke"), at(PIECE + 10), at(2 * PIECE + 10)]
    outcomes += [refusal(409, "upload_offset_mismatch"), at(2 * PIECE), at(WEIGHTS_BYTES), CannotConnect("restarting")]
    outcomes += [at(WEIGHTS_BYTES), reply({}, 201), PUSHED]
    _, calls = play(push(Push(adapter, "bot")), *outcomes)
    assert pieces(calls) == [
        ("0", PIECE),
        (f"{PIECE}", PIECE),
        (f"{PIECE + 10}", PIECE),
        (f"{2 * PIECE + 10}", PIECE // 2 - 10),
        (f"{2 * PIECE}", PIECE // 2),
    ]


def test_a_connection_that_keeps_breaking_is_given_up(adapter: Path) -> None:
    with pytest.raises(CannotConnect):
        play(push(Push(adapter, "bot")), KNOWN, UNKNOWN, BEGUN, ConnectionBroke("broke"), *[CannotConnect("nobody")] * 5)


def test_a_file_that_changed_meanwhile_leaves_nothing_behind(adapter: Path, tmp_path: Path) -> None:
    uploads = RememberedUploads("http://a", tmp_path / "cache")
    wrong = [at(WEIGHTS_BYTES), refusal(422, "digest_mismatch"), reply({})]
    with pytest.raises(ApiError) as caught:
        play(push(Push(adapter, "bot", uploads=uploads)), KNOWN, UNKNOWN, BEGUN, *wrong)
    assert caught.value.code == "digest_mismatch"
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize(
    "outcomes",
    [[refusal(404)], [refusal(429, "too_many_uploads")], [BEGUN, refusal(404, "upload_not_found"), UNKNOWN]],
)
def test_what_cannot_be_sent_in_pieces_is_one_request(adapter: Path, outcomes: list[Reply]) -> None:
    _, calls = play(push(Push(adapter, "bot", tag="beta")), KNOWN, UNKNOWN, *outcomes, PUSHED)
    assert calls[-1].body is not None
    body = b"".join(calls[-1].body)
    assert len(body) == int(calls[-1].body.headers["content-length"])
    assert b'name="tag"\r\n\r\nbeta\r\n' in body
    assert "idempotency-key" in calls[-1].headers


def test_an_upload_that_was_finished_unseen_is_no_failure(adapter: Path) -> None:
    outcomes = [KNOWN, UNKNOWN, BEGUN, at(WEIGHTS_BYTES), ConnectionBroke("broke"), UNKNOWN, KNOWN, PUSHED]
    _, calls = play(push(Push(adapter, "bot")), *outcomes)
    assert calls[-1].json["name"] == "bot"


def test_a_push_that_was_cut_off_goes_on_in_another_process(adapter: Path, tmp_path: Path) -> None:
    uploads = RememberedUploads("http://a", tmp_path / "cache")
    with pytest.raises(ApiError):
        play(push(Push(adapter, "bot", uploads=uploads)), KNOWN, UNKNOWN, BEGUN, at(PIECE), refusal(507, "storage_full"))
    again = RememberedUploads("http://a", tmp_path / "cache")
    rest = [at(PIECE), at(2 * PIECE), at(WEIGHTS_BYTES), reply({}, 201), PUSHED]
    _, calls = play(push(Push(adapter, "bot", uploads=again)), KNOWN, UNKNOWN, *rest)
    assert pieces(calls) == [(f"{PIECE}", PIECE), (f"{2 * PIECE}", PIECE // 2)]
    assert lines(calls)[2] == "HEAD /v1/blobs/uploads/u"
    assert not list((tmp_path / "cache").iterdir())


def test_what_is_remembered_belongs_to_a_server_and_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    RememberedUploads("http://a").remember("sha256:1", "u")
    assert RememberedUploads("http://a").recall("sha256:1") == "u"
    assert RememberedUploads("http://b").recall("sha256:1") is None
    monkeypatch.setattr("time.time", lambda: KEPT_S + (tmp_path / "medley").stat().st_mtime + 10)
    assert RememberedUploads("http://a").recall("sha256:1") is None
    blocked = tmp_path / "file"
    blocked.touch()
    RememberedUploads("http://a", blocked).remember("sha256:1", "u")
    assert RememberedUploads("http://a", blocked).recall("sha256:1") is None


def files_reply(**files: bytes) -> Reply:
    data = [
        {"name": name, "digest": f"sha256:{hashlib.sha256(content).hexdigest()}", "bytes": len(content)}
        for name, content in files.items()
    ]
    return reply({"name": "bot", "version": "v2", "data": data})


def test_pull_writes_checked_files_and_keeps_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    pulled, calls = play(pull("bot@stable", tmp_path, False, None), files_reply(a=b"1", b=b"22"), Reply(200, {}, b"22"))
    assert lines(calls) == ["GET /v1/adapters/bot@stable/files", "GET /v1/adapters/bot@v2/files/b"]
    assert (tmp_path / "b").read_bytes() == b"22"
    assert (pulled.version, [file.nbytes for file in pulled.files]) == ("v2", [1, 2])


def test_pull_refuses_other_content_before_it_writes(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"mine")
    with pytest.raises(MedleyError, match="other content in b"):
        play(pull("bot", tmp_path, False, None), files_reply(a=b"1", b=b"22"))
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    play(pull("bot", tmp_path, True, None), files_reply(b=b"22"), Reply(200, {}, b"22"))
    assert (tmp_path / "b").read_bytes() == b"22"


def test_damaged_downloads_get_no_name(tmp_path: Path) -> None:
    with pytest.raises(MedleyError, match="damaged"):
        play(pull("bot", tmp_path, False, None), files_reply(a=b"1"), Reply(200, {}, b"2"))
    assert not list(tmp_path.iterdir())
    play(pull("bot", tmp_path, False, None), files_reply(a=b"1"), ConnectionBroke("broke"), Reply(200, {}, b"1"))
    assert (tmp_path / "a").read_bytes() == b"1"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "", "c:x", "a\\b", "a\0b"])
def test_no_server_chooses_where_files_go(name: str, tmp_path: Path) -> None:
    with pytest.raises(MedleyError, match="would not stay"):
        play(pull("bot", tmp_path, False, None), files_reply(**{name: b"1"}))


def test_pauses_are_asked_for_and_not_made() -> None:
    flow = request(Call("GET", "/x"))
    advance(flow, None)
    assert isinstance(advance(flow, reply(status=503, retry_after="7")), Pause)
