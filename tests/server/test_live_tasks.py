"""Classification and embeddings as users meet them: real servers on a decoder and on an encoder, the openai SDK, the client, the command."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModel

from medley_client import ApiError, AsyncMedley
from medley_client.cli import main
from tests.conftest import TinyModels
from tests.live import Live, live_server
from tests.server.engine.test_tasks import make_probe
from tests.tiny import tiny_tokenizer

TEXT = "A small red house."


def serve(base: Path, directory: Path) -> Iterator[Live]:
    probes = {"colours": {"pooling": "mean"}, "tags": {"pooling": "none", "multi_label": True}}
    for name, config in probes.items():
        make_probe(base, directory / name, **config)
    with live_server(base, directory / "data") as server:
        with server.client() as client:
            for name in probes:
                client.adapters.push(directory / name, name)
        yield server


@pytest.fixture(scope="module")
def decoder(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    yield from serve(tiny_models("qwen2"), tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def encoder(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    yield from serve(tiny_models("bert"), tmp_path_factory.mktemp("encoder"))


@pytest.fixture(params=["decoder", "encoder"])
def live(request: pytest.FixtureRequest) -> Live:
    server: Live = request.getfixturevalue(request.param)
    return server


def sdk(live: Live, tenant: str = "acme") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.keys[tenant], max_retries=0)


def test_openai_embeddings_of_texts_and_tokens(encoder: Live, tiny_models: TinyModels) -> None:
    ids = tiny_tokenizer(wraps=True)(TEXT)["input_ids"]
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(tiny_models("bert")).eval()(input_ids=torch.tensor([ids])).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    client = sdk(encoder)
    for given in (TEXT, [TEXT], ids, [ids]):
        reply = client.embeddings.create(model="base", input=given)
        torch.testing.assert_close(torch.tensor(reply.data[0].embedding), expected, atol=1e-5, rtol=0)
        assert reply.usage.prompt_tokens == reply.usage.total_tokens == len(ids)
    floats = client.embeddings.create(model="base", input=TEXT, encoding_format="float", dimensions=32)
    torch.testing.assert_close(torch.tensor(floats.data[0].embedding), expected, atol=1e-5, rtol=0)


def test_openai_embeddings_of_many_texts_are_in_order(live: Live) -> None:
    texts = [f"number {index} " * (index % 7 + 1) for index in range(100)]
    reply = sdk(live).embeddings.create(model="base", input=texts)
    assert [item.index for item in reply.data] == list(range(100))
    alone = sdk(live).embeddings.create(model="base", input=texts[37]).data[0].embedding
    torch.testing.assert_close(torch.tensor(reply.data[37].embedding), torch.tensor(alone), atol=1e-5, rtol=0)
    assert abs(sum(value * value for value in alone) - 1) < 1e-5


def test_classify_texts(live: Live) -> None:
    with live.http() as client:
        body = client.post("/v1/classify", json={"model": "colours", "input": [TEXT, "Other."], "logits": True}).json()
        usage = body["usage"]["total_tokens"]
    assert [item["index"] for item in body["data"]] == [0, 1]
    first = body["data"][0]
    assert first["label"] == next(iter(first["scores"])) == max(first["logits"], key=first["logits"].get)
    assert abs(sum(first["scores"].values()) - 1) < 1e-6
    assert set(first["scores"]) == {"red", "green", "blue"}
    assert "labels" not in first
    assert usage > 20


def test_classify_tokens_with_the_client(live: Live) -> None:
    with live.client() as client:
        (found,) = client.classify([TEXT], adapter="tags")
        assert client.adapters.show("tags").facts["labels"] == ["red", "green", "blue"]
    plain = [token for token in found.tokens if not token.special]
    assert len(plain) == len(TEXT)
    assert all(0 <= score <= 1 for token in plain for score in token.scores.values())
    assert plain[0].label == next(iter(plain[0].scores))

    async def same() -> None:
        async with AsyncMedley(live.url, live.keys["acme"]) as client:
            assert await client.classify([TEXT], adapter="tags") == [found]
            assert len((await client.embed([TEXT]))[0]) == 32

    asyncio.run(same())


def test_the_commands(live: Live) -> None:
    connection = ["--url", live.url, "--api-key", live.keys["acme"]]
    shown = io.StringIO()
    with redirect_stdout(shown):
        assert main(["classify", TEXT, "--adapter", "colours", "--json", *connection]) == 0
    assert json.loads(shown.getvalue())[0]["label"] in ("red", "green", "blue")
    shown = io.StringIO()
    with redirect_stdout(shown):
        assert main(["embed", TEXT, "two", *connection]) == 0
    assert [len(json.loads(line)) for line in shown.getvalue().splitlines()] == [32, 32]
    assert main(["classify", TEXT, *connection]) == 1


def test_without_a_classifier_the_error_names_those_that_have_one(live: Live) -> None:
    with pytest.raises(ApiError) as caught, live.client() as client:
        client.classify([TEXT])
    assert caught.value.code == "no_task_head"
    assert "colours, tags" in caught.value.message
    with pytest.raises(ApiError) as caught, live.client("globex") as client:
        client.classify([TEXT])
    assert "none of your adapters" in caught.value.message
    with pytest.raises(ApiError) as caught, live.client("globex") as client:
        client.classify([TEXT], adapter="colours")
    assert caught.value.status == 404


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"input": []}, 400, "invalid_request"),
        ({"input": ["x"] * 257}, 400, "invalid_request"),
        ({"input": [["x"]]}, 400, "invalid_request"),
        ({"input": [10**6]}, 400, "invalid_token_id"),
        ({"input": [5] * 513}, 400, "prompt_too_long"),
        ({"dimensions": 16}, 400, "unsupported_parameter"),
        ({"encoding_format": "int8"}, 400, "invalid_request"),
        ({"temperature": 1}, 400, "invalid_request"),
        ({"model": "nobody"}, 404, "adapter_not_found"),
    ],
)
def test_embedding_requests_that_are_refused(change: dict[str, object], status: int, code: str, live: Live) -> None:
    with live.http() as client:
        reply = client.post("/v1/embeddings", json={"model": "base", "input": TEXT, **change})
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["code"] == code


def test_an_encoder_generates_nothing(encoder: Live) -> None:
    with encoder.http() as client:
        calls = {
            "/generate": {"inputs": "Hi"},
            "/v1/completions": {"prompt": "Hi"},
            "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
        }
        for path, body in calls.items():
            reply = client.post(path, json=body)
            assert reply.status_code == 400, path
            error = reply.json() if path == "/generate" else reply.json()["error"]
            assert error["code"] == "task_not_served"
        metrics = client.get("/metrics").text
    assert "medley_engine_ready 1.0" in metrics


def test_a_decoder_does_all_three_at_once(decoder: Live) -> None:
    async def together() -> None:
        async with AsyncMedley(decoder.url, decoder.keys["acme"]) as client:
            text, labels, vectors = await asyncio.gather(
                client.generate("Hello", max_new_tokens=16, ignore_eos_token=True),
                client.classify([TEXT] * 8, adapter="colours"),
                client.embed([TEXT] * 8),
            )
        assert text.generated_tokens == 16
        assert len({item.label for item in labels}) == 1
        assert len(vectors) == 8

    asyncio.run(together())
