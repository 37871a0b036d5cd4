"""Tenants who mean ill, and those who are merely unlucky: whole servers, and never a 5xx, another's name or another's wait."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.numpy import save

from medley_client import Medley
from tests.conftest import TinyModels
from tests.live import Live, Sharing
from tests.parity.cases import Case, make_checkpoint

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    config = LoraConfig(r=2, lora_alpha=8, target_modules="all-linear")
    return {
        name: make_checkpoint(Case(name, lambda _: config, scale=0.3), "llama", model, directory / name, seed=seed)
        for seed, name in enumerate(("one", "two"))
    }


@pytest.fixture(scope="module")
def live(sharing: Sharing, adapters: dict[str, Path]) -> Live:
    server = sharing()
    server.push(adapters)
    assert push(server, "probe", probe()).status_code == 201
    return server


def probe(outputs: int = 3, **config: Any) -> Files:
    weight = np.random.default_rng(outputs).normal(size=(outputs, 32)).astype("f4")
    return {
        "adapter_config.json": json.dumps({"medley_type": "PROBE", **config}).encode(),
        "adapter_model.safetensors": save({"0.weight": weight}),
    }


def push(live: Live, name: str, files: Files, tenant: str = "acme") -> httpx.Response:
    with live.http(tenant) as http:
        return http.post("/v1/adapters", data={"name": name}, files=[("files", item) for item in files.items()])


def tensors(header: bytes, data: bytes = b"") -> Files:
    content = struct.pack("<Q", len(header)) + header + data
    return {**probe(), "adapter_model.safetensors": content}


def tarred(files: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return target.getvalue()


ONE = b'"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
UPLOADS: dict[str, tuple[Files, str]] = {
    "half a surrogate pair in labels": ({**probe(), "labels.json": b'["a","b","\\ud800"]'}, "surrogate"),
    "in the config's labels": (
        {**probe(), "adapter_config.json": b'{"medley_type":"PROBE","labels":["a","b","\\udfff"]}'},
        "surrogate",
    ),
    "in a field": ({**probe(), "adapter_config.json": b'{"medley_type":"PROBE","\\ud800":[1]}'}, "surrogate"),
    "in a fusion's name": (
        {"adapter_fusion_config.json": b'{"name":"\\ud800"}', "adapter.safetensors": save({"a": np.ones(1)})},
        "surr",
    ),
    "in a tensor's name": (tensors(b'{"\\ud800":{' + ONE, b"\xff" * 4), "surrogate"),
    "in a dtype": (tensors(b'{"a":{"dtype":"\\ud800","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4), "surrogate"),
    "metadata": (tensors(b'{"__metadata__":{"a":{}},"0.weight":{' + ONE, b"\0" * 4), "object of texts"),
    "control characters": ({**probe(), "labels.json": json.dumps(["\x1b[31mred", "b", "c"]).encode()}, "control characters"),
    "in the config": (probe(labels=["\x1b[31mred", "b", "c"]), "printable"),
    "no labels": ({**probe(), "labels.json": b"[]"}, "at least one"),
    "labels twice": ({**probe(labels=["x", "y", "z"]), "labels.json": b'["a","b","c"]'}, "leave one out"),
    "nothing to name": ({**probe(), "adapter_config.json": b'{"medley_type":"BITFIT"}', "labels.json": b'["a"]'}, "faults"),
    "no outputs": (probe(0), "1 to 4096"),
    "very many outputs": (probe(1 << 20), "1 to 4096"),
    "very many labels": (probe(3, labels=[str(index) for index in range(5000)]), "1 to 4096"),
    "very many layers": (
        {**probe(), "adapter_model.safetensors": save({f"{index}.weight": np.ones((32, 32), "f2") for index in range(2000)})},
        "no module",
    ),
    "an integer classifier": ({**probe(), "adapter_model.safetensors": save({"0.weight": np.ones((3, 32), "i8")})}, "floating"),
    "a boolean classifier": ({**probe(), "adapter_model.safetensors": save({"0.weight": np.ones((3, 32), bool)})}, "floating"),
    "a complex classifier": (tensors(b'{"0.weight":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}', b"\0" * 8), "BF16"),
}


@pytest.mark.parametrize("case", UPLOADS)
def test_hostile_uploads_are_refused_and_cost_nobody_a_process(case: str, live: Live) -> None:
    files, message = UPLOADS[case]
    before = live.child("server.adapters.lowering_process").pid
    reply = push(live, "hostile", files)
    assert reply.status_code == 422, reply.text
    assert message in reply.text
    assert live.child("server.adapters.lowering_process").pid == before


def test_labels_without_a_classifier_are_refused(live: Live, adapters: dict[str, Path]) -> None:
    files = {path.name: path.read_bytes() for path in adapters["one"].iterdir() if path.name.startswith("adapter")}
    reply = push(live, "hostile", {**files, "labels.json": b'["a","b"]'})
    assert reply.status_code == 422
    assert reply.json()["error"]["faults"][0]["where"] == "labels.json"


def test_odd_names_in_an_archive_are_only_listed(live: Live) -> None:
    reply = push(live, "odd", {"x.tar": tarred({**probe(), "odd\udcff.txt": b""})})
    assert reply.status_code == 201, reply.text
    assert reply.json()["skipped"] == ["odd\ufffd.txt"]


def test_large_classifiers_answer_within_bounds(live: Live) -> None:
    assert push(live, "large", probe(4096)).status_code == 201
    assert push(live, "tags", probe(4096, pooling="none")).status_code == 201
    with live.http() as http:
        reply = http.post("/v1/classify", json={"model": "large", "input": ["x", "y"]})
        assert len(reply.json()["data"][1]["scores"]) == 4096
        for name, given in (("large", ["x"] * 65), ("tags", "x" * 65)):
            refused = http.post("/v1/classify", json={"model": name, "input": given})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")
            assert "65" in refused.json()["error"]["message"]
        http.delete("/v1/adapters/large")
        http.delete("/v1/adapters/tags")


def questions(name: str) -> list[tuple[str, str, Any]]:
    several = [{"adapter": "mine"}, {"adapter": name, "weight": 0.5}]
    asked: list[tuple[str, str, Any]] = [
        ("POST", "/generate", {"inputs": "x", "parameters": {"adapter_id": name}}),
        ("POST", "/generate", {"inputs": "x", "parameters": {"adapters": several}}),
        ("POST", "/generate_stream", {"inputs": "x", "parameters": {"adapter_id": name, "adapter_drop": 1}}),
        ("POST", "/v1/completions", {"model": name, "prompt": "x"}),
        ("POST", "/v1/completions", {"adapters": several, "prompt": "x", "stream": True}),
        ("POST", "/v1/chat/completions", {"adapters": several, "messages": [{"role": "user", "content": "x"}]}),
        ("GET", f"/v1/models/{name}", None),
        ("DELETE", f"/v1/adapters/{name}", None),
    ]
    if "@" not in name:
        asked.append(("GET", f"/v1/adapters/{name}", None))
    for path in ("/v1/classify", "/v1/embeddings"):
        asked += [("POST", path, {"model": name, "input": "x"}), ("POST", path, {"adapters": several, "input": "x"})]
    return asked


def answers(live: Live, tenant: str, names: list[str]) -> list[tuple[int, bytes]]:
    with live.http(tenant) as http:
        replies = [http.request(method, path, json=body) for name in names for method, path, body in questions(name)]
    config = {"name": "theirs,mine", "version": "adapters.1.3", "config": {"query_before_ln": False}}
    fusion = {"adapter_fusion_config.json": json.dumps(config).encode(), "adapter.safetensors": save({"a": np.ones(1)})}
    replies.append(push(live, "fused", fusion, tenant))
    return [(reply.status_code, reply.content) for reply in replies]


def test_what_is_anothers_and_what_is_not_there_are_the_same(live: Live) -> None:
    assert push(live, "mine", probe(4), "globex").status_code == 201
    digest = push(live, "known", probe(5)).json()["digest"]
    names = ["theirs", "theirs@v1", f"theirs@{digest}", f"theirs@{digest[:19]}"]
    before = answers(live, "globex", names)
    assert push(live, "theirs", probe(5)).json()["digest"] == digest
    assert answers(live, "globex", names) == before
    assert {status for status, _ in before} == {404, 422}
    assert push(live, "mine", probe(5), "globex").json()["digest"] == digest, "the same files are not the same adapter"
    assert answers(live, "globex", names) == before


def composites(live: Live) -> set[Path]:
    return set(live.data_dir.glob("programs/*/*.safetensors"))


def test_a_delete_does_not_reach_the_same_files_of_another(live: Live, adapters: dict[str, Path]) -> None:
    weights = {"one": 0.5, "two": 0.25}
    with live.client() as acme, live.client("globex") as globex:
        globex.adapters.push(adapters["one"], "copy")
        before = composites(live)
        acme.generate("Hello", adapter=weights, max_new_tokens=2)
        (made,) = composites(live) - before
        globex.adapters.delete("copy")
        assert made.exists()
        acme.adapters.push(adapters["one"], "again")
        acme.adapters.delete("again")
        assert made.exists()


def test_deleting_and_pushing_under_load_gives_answers_or_404(live: Live, adapters: dict[str, Path]) -> None:
    def ask(number: int) -> int:
        named = [{"adapter": "part", "weight": 1 + number % 3}, {"adapter": "two"}]
        with live.http() as http:
            body = {"inputs": "Hello", "parameters": {"adapters": named, "max_new_tokens": 8}}
            return http.post("/generate" if number % 2 else "/generate_stream", json=body).status_code

    def replace(client: Medley) -> None:
        for _ in range(12):
            client.adapters.push(adapters["one"], "part")
            client.adapters.delete("part")

    with live.client() as client, ThreadPoolExecutor(6) as pool:
        replacing = pool.submit(replace, client)
        found = list(pool.map(ask, range(60)))
        replacing.result()
    assert set(found) <= {200, 404}
    assert not [path for path in composites(live) if path.name.startswith(".")]


def test_who_cycles_weights_is_held_back_and_holds_back_nobody(live: Live, adapters: dict[str, Path]) -> None:
    def cycle(number: int) -> httpx.Response:
        named = [{"adapter": "one", "weight": 1 + number / 1000}, {"adapter": "two"}]
        with live.http() as http:
            return http.post("/generate", json={"inputs": "x", "parameters": {"adapters": named, "max_new_tokens": 1}})

    with live.client("globex") as globex, ThreadPoolExecutor(60) as pool:
        globex.adapters.push(adapters["one"], "mine-too")
        hogging = [pool.submit(cycle, number) for number in range(120)]
        for weight in (0.1, 0.2, 0.3):
            assert globex.generate("x", adapter={"mine-too": weight}, max_new_tokens=1).generated_tokens == 1
        replies = [item.result() for item in hogging]
    assert {reply.status_code for reply in replies} <= {200, 429}
    for reply in replies:
        if reply.status_code == 429:
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["code"] == "overloaded"


def test_what_does_not_add_up_lists_its_faults_in_both_shapes(live: Live) -> None:
    body = {"adapters": [{"adapter": "probe"}, {"adapter": "odd-probe"}]}
    assert push(live, "odd-probe", probe(7)).status_code == 201
    with live.http() as http:
        plain = http.post("/generate", json={"inputs": "x", "parameters": body}).json()
        openai = http.post("/v1/completions", json={"prompt": "x", **body}).json()["error"]
        assert http.post("/v1/classify", json={"model": "probe", "adapter_drop": 9, "input": "x"}).status_code == 422
    assert plain["code"] == openai["code"] == "not_composable"
    assert plain["faults"] == openai["faults"]


WITHOUT_BODY = {"/v1/blobs/uploads", "/v1/adapters/{reference}/load", "/v1/adapters/{reference}/pin"}


def test_every_body_is_in_the_openapi_document(live: Live) -> None:
    with live.http() as http:
        document = http.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    for path, operations in document["paths"].items():
        if "post" in operations:
            contents = operations["post"].get("requestBody", {"content": {}})["content"].values()
            assert all(content["schema"] for content in contents), path
            assert contents or path in WITHOUT_BODY, path
    text = json.dumps(document)
    assert all(f'"#/components/schemas/{name}"' in text for name in schemas)
    assert {"type": "string"} in schemas["EmbeddingsRequest"]["properties"]["input"]["anyOf"]


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=6)
    | st.sampled_from(["probe", "one", "two", "base", "one@v1", "nobody", 1, 2, 0.5, "float", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("adapter", "weight")) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
FIELDS = ("model", "adapters", "adapter_drop", "input", "logits", "encoding_format", "dimensions", "user")
WEIGHTED = st.fixed_dictionaries(
    {"adapter": st.sampled_from(("one", "two", "probe", "nobody"))},
    optional={"weight": st.floats() | st.sampled_from((-1, 0, 0.5, 2))},
)
LIKELY: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(("base", "one", "probe", "nobody")),
    "adapters": st.none() | st.lists(WEIGHTED, max_size=9),
    "adapter_drop": st.integers(-1, 3),
    "input": st.sampled_from(("Hello", ["a", "b"], [5, 6], [[5], [6, 7]], "", [], "x" * 600)),
    "logits": st.booleans(),
}


@settings(max_examples=150)
@given(data=st.data())
def test_no_body_breaks_the_routes_without_tokens(data: st.DataObject, live: Live) -> None:
    path = data.draw(st.sampled_from(("/v1/classify", "/v1/embeddings")))
    body = {"input": "x", **data.draw(st.fixed_dictionaries({}, optional=LIKELY))}
    body |= data.draw(st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), VALUES, max_size=1))
    content = json.dumps(body).encode()
    with live.http() as http:
        reply = http.post(path, content=content, headers={"content-type": "application/json"})
    assert reply.status_code < 500, (content, reply.text)
    if reply.status_code >= 400:
        error = reply.json()["error"]
        assert error["message"]
        assert error["code"]
