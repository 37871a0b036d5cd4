"""Blobs over HTTP: resumable uploads, manifests of what is there already, and downloads; and that nobody sees another's."""

from __future__ import annotations

import hashlib
import http.client
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from peft import LoraConfig

from tests.conftest import TinyModels
from tests.live import Live
from tests.parity.cases import Case, make_checkpoint
from tests.server.api.test_versions import FILES, answer, code, push

CASE = Case("law", lambda _: LoraConfig(r=3, lora_alpha=8, target_modules=["q_proj", "down_proj"]), scale=0.5)


@pytest.fixture(scope="module")
def live(shared: Live) -> Live:
    return shared


@pytest.fixture(scope="module")
def adapter(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(CASE, "llama", tiny_models("llama"), tmp_path_factory.mktemp("adapter") / "law", seed=5)


@pytest.fixture
def http_client(live: Live) -> Iterator[httpx.Client]:
    with live.http() as client:
        yield client


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def begin(client: httpx.Client) -> str:
    begun = client.post("/v1/blobs/uploads")
    assert (begun.status_code, begun.headers["upload-offset"]) == (201, "0")
    return str(begun.headers["location"])


def upload(client: httpx.Client, content: bytes, piece: int = 1000) -> httpx.Response:
    place = begin(client)
    for start in range(0, len(content), piece):
        reply = client.patch(place, content=content[start : start + piece], headers={"upload-offset": str(start)})
        assert (reply.status_code, reply.headers["upload-offset"]) == (204, str(min(len(content), start + piece)))
    return client.put(place, params={"digest": digest_of(content)})


def test_an_adapter_of_blobs_is_the_adapter(live: Live, http_client: httpx.Client, adapter: Path) -> None:
    contents = {name: (adapter / name).read_bytes() for name in FILES}
    digests = {name: digest_of(content) for name, content in contents.items()}
    manifest = {"name": "of-blobs", "files": digests}
    assert code(http_client.post("/v1/adapters", json=manifest)) == (404, "blob_not_found")
    for name, content in contents.items():
        assert http_client.head(f"/v1/blobs/{digests[name]}").status_code == 404
        assert upload(http_client, content).json() == {"object": "blob", "digest": digests[name], "bytes": len(content)}
        known = http_client.head(f"/v1/blobs/{digests[name]}")
        assert (known.status_code, known.headers["content-length"]) == (200, str(len(content)))
    with live.http("globex") as other:
        assert other.head(f"/v1/blobs/{digests[FILES[1]]}").status_code == 404, "others' blobs do not exist"
        assert code(other.get(f"/v1/blobs/{digests[FILES[1]]}")) == (404, "blob_not_found")
        assert code(other.post("/v1/adapters", json=manifest)) == (404, "blob_not_found"), "no claiming by digest"
    made = http_client.post("/v1/adapters", json=manifest)
    assert made.status_code == 201
    assert made.json()["digest"] == push(http_client, adapter, "of-files").json()["digest"], "however they came"
    assert answer(http_client, "of-blobs") == answer(http_client, "of-files")
    listed = http_client.get("/v1/adapters/of-blobs@v1/files").json()["data"]
    assert {item["name"]: item["digest"] for item in listed} == digests
    for name, content in contents.items():
        got = http_client.get(f"/v1/adapters/of-blobs/files/{name}")
        assert (got.content, got.headers["content-disposition"]) == (content, f'attachment; filename="{name}"')
        assert http_client.get(f"/v1/blobs/{digests[name]}").content == content
    assert code(http_client.get("/v1/adapters/of-blobs/files/other")) == (404, "blob_not_found")


def test_a_broken_upload_goes_on_where_it_stopped(live: Live, http_client: httpx.Client) -> None:
    content = bytes(range(256)) * 4096
    place = begin(http_client)
    address = urlsplit(live.url)
    raw = http.client.HTTPConnection(address.hostname or "", address.port or 0)
    raw.putrequest("PATCH", place)
    for name, value in (
        ("content-length", str(len(content))),
        ("upload-offset", "0"),
        ("authorization", f"Bearer {live.keys['acme']}"),
    ):
        raw.putheader(name, value)
    raw.endheaders()
    raw.send(content[: len(content) // 2])
    raw.close()
    arrived = _settled(http_client, place)
    assert 0 < arrived <= len(content) // 2
    wrong = http_client.patch(place, content=b"x", headers={"upload-offset": str(arrived + 1)})
    assert code(wrong) == (409, "upload_offset_mismatch")
    assert http_client.patch(place, content=content[arrived:], headers={"upload-offset": str(arrived)}).status_code == 204
    assert http_client.put(place, params={"digest": digest_of(content)}).status_code == 201
    assert http_client.get(f"/v1/blobs/{digest_of(content)}").content == content


def _settled(client: httpx.Client, place: str) -> int:
    """The offset once the server has noticed that the connection is gone: it has not changed for half a second."""
    found, times = 0, 0
    while not found or times < 5:
        now = int(client.head(place).headers["upload-offset"])
        found, times = now, times + 1 if now == found else 0
        time.sleep(0.1)
    return found


def test_refusals(live: Live, http_client: httpx.Client) -> None:
    place = begin(http_client)
    for headers in ({}, {"upload-offset": "-1"}, {"upload-offset": "x"}, {"upload-offset": "9" * 30}):
        assert code(http_client.patch(place, content=b"abc", headers=headers)) == (400, "invalid_request")
    assert http_client.patch(place, content=b"abc", headers={"upload-offset": "0"}).status_code == 204
    assert code(http_client.put(place, params={"digest": digest_of(b"abd")})) == (422, "digest_mismatch")
    for digest in ("abc", "md5:abc", "sha256:" + "G" * 64, "sha256:../../x"):
        assert http_client.put(place, params={"digest": digest}).status_code == 400
        assert http_client.head(f"/v1/blobs/{digest.replace('/', '%2f')}").status_code in (400, 404)
    with live.http("globex") as other:
        assert other.head(place).status_code == 404
        assert code(other.patch(place, content=b"x", headers={"upload-offset": "3"})) == (404, "upload_not_found")
        assert code(other.put(place, params={"digest": digest_of(b"abc")})) == (404, "upload_not_found")
        assert code(other.delete(place)) == (404, "upload_not_found")
    assert http_client.delete(place).status_code == 200
    assert http_client.head(place).status_code == 404
    assert code(http_client.post("/v1/adapters", json={"name": "x", "files": {}})) == (400, "invalid_request")
    assert code(http_client.post("/v1/adapters", json={"name": "x", "files": {"a": "sha256:" + "0" * 64}, "more": 1})) == (
        400,
        "invalid_request",
    )
    big = http_client.post("/v1/adapters", content=b"[" * (100 << 10), headers={"content-type": "application/json"})
    assert code(big) == (413, "body_too_large")
