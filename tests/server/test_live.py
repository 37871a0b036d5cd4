"""The whole server as its users meet it: real processes, real HTTP, real clients."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from peft import PromptTuningConfig
from safetensors.numpy import load_file, save_file

from medley_client import ApiError, AsyncMedley
from tests.conftest import TinyModels
from tests.harness import greedy, load_base_for_lowering, lower_directory, make_engine, run
from tests.live import Live, Sharing, live_server, wait_for
from tests.parity.cases import Case, make_checkpoint
from tests.parity.variants import VARIANTS, make_adapter
from tests.tiny import tiny_tokenizer

ROOT = Path(__file__).parents[2]
CLIENTS_PYTHON = ROOT / ".venv-clients" / "bin" / "python"
NAMES = ("plain", "dora", "token-rows", "activated")


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return {item.name: make_adapter(item, "llama", model, directory / item.name) for item in VARIANTS if item.name in NAMES}


@pytest.fixture(scope="module")
def live(sharing: Sharing, adapters: dict[str, Path]) -> Live:
    server = sharing()
    server.push(adapters)
    return server


def expected_tokens(model: Path, adapter: Path | None, prompt: str, count: int) -> list[int]:
    """What the engine alone makes of a prompt, in this process."""
    engine = make_engine(model)
    ids = tiny_tokenizer()(prompt)["input_ids"]
    request = greedy("x", ids, tokens=count)
    if adapter is not None:
        request = greedy("x", ids, lower_directory(adapter, load_base_for_lowering(model), "x"), tokens=count)
    result = run(engine, [request])["x"]
    engine.close()
    return result.tokens


def test_tenants_with_the_same_name_get_their_own_adapter(live: Live, model: Path, adapters: dict[str, Path]) -> None:
    with live.client("acme") as acme, live.client("globex") as globex:
        acme.adapters.push(adapters["plain"], "shared-name")
        globex.adapters.push(adapters["dora"], "shared-name")

        def ask(number: int) -> tuple[int, list[int]]:
            client, adapter = ((acme, "shared-name"), (globex, "shared-name"), (acme, None))[number % 3]
            made = client.generate("One prompt for all", adapter=adapter, max_new_tokens=12, ignore_eos_token=True)
            return number % 3, [token.id for token in made.tokens]

        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(ask, range(24)))
    for kind, adapter in enumerate((adapters["plain"], adapters["dora"], None)):
        assert {tuple(tokens) for which, tokens in found if which == kind} == {
            tuple(expected_tokens(model, adapter, "One prompt for all", 12))
        }


def test_openai_sdk(live: Live) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.keys["acme"], max_retries=0)
    assert [model.id for model in client.models.list()][1:] == sorted({*NAMES, "shared-name"})
    assert client.models.retrieve("plain").owned_by == live.names["acme"]
    whole = client.completions.create(
        model="plain", prompt="Hello", max_tokens=6, temperature=0, logprobs=2, extra_body={"ignore_eos": True}
    )
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 6)
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.token_logprobs or []) == 6
    parts = list(
        client.completions.create(
            model="plain", prompt="Hello", max_tokens=6, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
    )
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    assert parts[-1].choices[0].finish_reason == "length"
    messages = [{"role": "user", "content": "Hi"}]
    chat = client.chat.completions.create(
        model="plain", messages=messages, max_completion_tokens=6, temperature=0, n=2, logprobs=True, top_logprobs=3
    )  # type: ignore[call-overload]
    assert len(chat.choices) == 2
    assert chat.choices[0].message.content == chat.choices[1].message.content
    assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 3
    stream = client.chat.completions.create(
        model="plain", messages=messages, max_tokens=6, temperature=0, stream=True, stream_options={"include_usage": True}
    )  # type: ignore[call-overload]
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == chat.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == chat.usage.completion_tokens / 2
    seeded = [
        client.completions.create(model="plain", prompt="Hello", max_tokens=20, temperature=1, seed=7).choices[0].text
        for _ in range(2)
    ]
    assert seeded[0] == seeded[1]
    echoed = client.completions.create(model="base", prompt=["ab", "cde"], max_tokens=1, echo=True, logprobs=0, temperature=0)
    assert [choice.text[: len(prompt)] for choice, prompt in zip(echoed.choices, ("ab", "cde"), strict=True)] == ["ab", "cde"]
    assert echoed.choices[1].logprobs.token_logprobs[0] is None  # type: ignore[union-attr, index]
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="Hello")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="plain", messages=messages, temperature=-1)  # type: ignore[arg-type]
    assert refused.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_stop_strings_are_cut_off_and_end_the_request(live: Live) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.keys["acme"])
    ask = {"model": "dora", "prompt": "Hello", "max_tokens": 40, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.completions.create(**ask).choices[0].text  # type: ignore[call-overload]
    stop = whole[8:11]
    for stream in (False, True):
        reply = client.completions.create(**ask, stop=[stop, "never"], stream=stream)  # type: ignore[call-overload]
        choices = [part.choices[0] for part in reply] if stream else [reply.choices[0]]
        assert "".join(choice.text for choice in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"


LORAX = """
import sys
from lorax import Client
client = Client(sys.argv[1], headers={"authorization": "Bearer " + sys.argv[2]})
whole = client.generate("Hello", adapter_id="plain", max_new_tokens=8, ignore_eos_token=True)
assert whole.details.generated_tokens == 8, whole
text, last = "", None
for part in client.generate_stream("Hello", adapter_id="plain", max_new_tokens=8, ignore_eos_token=True):
    last = part
assert last.generated_text == whole.generated_text
base = client.generate("Hello", max_new_tokens=8, ignore_eos_token=True)
assert base.generated_text != whole.generated_text
for seed in range(20):  # nearly uniform draws meet the end token sooner or later
    hot = dict(adapter_id="plain", do_sample=True, temperature=50.0, seed=seed, max_new_tokens=400)
    ended = client.generate("Hello", **hot)
    if ended.details.finish_reason == "eos_token":
        break
parts = list(client.generate_stream("Hello", **hot))
assert ended.details.finish_reason == "eos_token", ended
assert ended.details.tokens[-1].special and parts[-1].token.special
assert len(parts) == len(ended.details.tokens) == ended.details.generated_tokens
assert parts[-1].generated_text == ended.generated_text
sampled = client.generate("Hello", adapter_id="plain", do_sample=True, temperature=0.7, top_k=5, top_p=0.9, seed=3, max_new_tokens=4)
try:
    client.generate("Hello", adapter_id="nobody")
except Exception as error:
    print(type(error).__name__, whole.generated_text.encode())
"""
TGI = """
import sys
from text_generation import Client
client = Client(sys.argv[1], headers={"authorization": "Bearer " + sys.argv[2]})
whole = client.generate("Hello", max_new_tokens=8, decoder_input_details=True)
assert len(whole.details.prefill) == 5, whole
parts = list(client.generate_stream("Hello", max_new_tokens=8))
assert parts[-1].generated_text == whole.generated_text
print(whole.details.finish_reason)
"""


@pytest.mark.parametrize("script", [LORAX, TGI], ids=["lorax-client", "text-generation"])
def test_clients_of_other_servers_work_unchanged(script: str, live: Live) -> None:
    assert CLIENTS_PYTHON.exists(), "make the clients' environment first: make setup"
    finished = subprocess.run([CLIENTS_PYTHON, "-c", script, live.url, live.keys["acme"]], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def spoiled(adapter: Path, directory: Path, change: str) -> Path:
    """A copy of an adapter with one thing wrong."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = dict(load_file(adapter / "adapter_model.safetensors"))
    first = sorted(tensors)[0]
    if change == "method":
        config["peft_type"] = "XLORA"
    elif change == "field":
        config |= {"use_qalora": True, "made_up": 3, "r": "four"}
    elif change == "tensor":
        tensors["base_model.model.model.layers.0.self_attn.q_proj.surprise"] = np.zeros(3, "f4")
        tensors["base_model.model.nowhere.weight"] = np.zeros(3, "f4")
    elif change == "shape":
        tensors[first] = np.zeros((4, 7), "f4")
    elif change == "half":
        del tensors[first]
    elif change == "pattern":
        config["rank_pattern"] = {"(a+)+$": 2}
    elif change == "overflow":
        tensors[first] = np.full_like(tensors[first], 3e38)
        config["lora_alpha"] = 1e6
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ("method", {"unsupported_method"}),
        ("field", {"unsupported_field"}),
        ("tensor", {"unused_tensor", "unmatched_tensor"}),
        ("shape", {"wrong_shape"}),
        ("half", {"missing_tensor"}),
        ("pattern", {"unsupported_field"}),
    ],
)
def test_adapters_that_do_not_fit_are_refused_with_all_faults(
    change: str, codes: set[str], live: Live, adapters: dict[str, Path], tmp_path: Path
) -> None:
    with live.client() as client, pytest.raises(ApiError) as caught:
        client.adapters.push(spoiled(adapters["plain"], tmp_path / "spoiled", change), "spoiled")
    assert (caught.value.status, caught.value.code) == (422, "adapter_rejected")
    assert {fault.code for fault in caught.value.faults} == codes
    assert len(caught.value.faults) >= len(codes)
    with live.client() as client, pytest.raises(ApiError, match="there is no adapter"):
        client.adapters.show("spoiled")


BAD_BODIES = (
    ("/generate", {"inputs": ""}, "empty_prompt"),
    ("/generate", {"inputs": "x" * 600}, "prompt_too_long"),
    ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 10_000}}, "prompt_too_long"),
    ("/generate", {"inputs": "x", "parameters": {"temperature": -1.0}}, "validation"),
    ("/generate", {"inputs": "x", "parameters": {"top_p": 0.0}}, "validation"),
    ("/generate", {"inputs": "x", "parameters": {"watermark": True}}, "validation"),
    ("/generate", {"inputs": "x", "parameters": {"adapter_id": "nobody"}}, "adapter_not_found"),
    ("/generate", {"inputs": "x", "parameters": {"adapter_id": "../../etc/passwd"}}, "invalid_adapter_name"),
    ("/generate", {"inputs": "x", "parameters": {"adapter_source": "s3"}}, "validation"),
    ("/generate", {"inputs": "x", "parameters": {"unknown": 1}}, "validation"),
    ("/generate", {"inputs": 3}, "validation"),
    ("/v1/completions", {"model": "base", "prompt": "x", "n": 9}, "invalid_request"),
    ("/v1/completions", {"model": "base", "prompt": []}, "invalid_request"),
    ("/v1/completions", {"model": "base", "prompt": [10**8]}, "invalid_token_id"),
    ("/v1/completions", {"model": "base", "prompt": "x", "logit_bias": {"a": 1}}, "invalid_request"),
    ("/v1/completions", {"model": "base", "prompt": "x", "stop": ["a"] * 5}, "invalid_request"),
    ("/v1/completions", {"model": "base", "prompt": "x", "logprobs": 99}, "invalid_request"),
    ("/v1/completions", {"model": "base", "prompt": "x", "max_tokens": 0}, "invalid_request"),
    ("/v1/completions", {"model": "base", "prompt": "x", "suffix": "y"}, "invalid_request"),
    ("/v1/chat/completions", {"model": "base", "messages": []}, "invalid_request"),
    ("/v1/chat/completions", {"model": "base", "messages": [{"role": "x", "content": "y"}]}, "invalid_request"),
    ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "y"}], "tools": [{}]}, "invalid_request"),
    (
        "/v1/chat/completions",
        {"model": "base", "messages": [{"role": "user", "content": "y"}], "top_logprobs": 2},
        "invalid_request",
    ),
)


@pytest.mark.parametrize(("path", "body", "code"), BAD_BODIES)
def test_bad_requests_get_a_typed_error(path: str, body: dict[str, object], code: str, live: Live) -> None:
    with live.http() as http:
        reply = http.post(path, json=body)
    assert 400 <= reply.status_code < 500
    found = reply.json() if path == "/generate" else reply.json()["error"]
    assert found["code"] == code
    assert reply.headers["x-request-id"]


def test_virtual_tokens_count_against_the_limit_and_are_nobodys_usage(live: Live, model: Path, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=20)
    adapter = make_checkpoint(Case("prompt", lambda _: config, scale=0.5), "llama", model, tmp_path)
    body = {"model": "prompted", "prompt": [9, 200, 31], "temperature": 0, "ignore_eos": True}
    with live.client() as client, live.http() as http:
        facts = client.adapters.push(adapter, "prompted").facts
        reply = http.post("/v1/completions", json={**body, "max_tokens": 4}).json()
        long = http.post("/v1/completions", json={**body, "max_tokens": 490})
        client.adapters.delete("prompted")
    assert facts["virtual_tokens"] == 20
    assert (reply["usage"]["prompt_tokens"], reply["usage"]["completion_tokens"]) == (3, 4)
    error = long.json()["error"]
    assert (long.status_code, error["code"]) == (400, "prompt_too_long")
    assert "must fit into 492 (the adapter's 20 virtual tokens take the rest)" in error["message"]


def test_odd_bodies_never_break_the_server(live: Live) -> None:
    with live.http() as http:
        for content in (b"", b"{", b"[" * 100_000, b"\xff\xfe", b'{"inputs": NaN}', b'"text"', b"null", b'{"inputs": "\\ud800"}'):
            reply = http.post("/generate", content=content, headers={"content-type": "application/json"})
            assert 400 <= reply.status_code < 500, content[:20]
        assert http.post("/generate", content=b"x" * (3 << 20)).status_code == 413
        assert http.post("/generate", content=(b"x" * (1 << 20) for _ in range(3))).status_code == 413
        assert http.post("/generate", content=b"{}", headers={"content-encoding": "gzip"}).status_code == 415
        assert http.post("/v1/adapters", content=b"nonsense").status_code == 400
        assert (
            http.post(
                "/v1/adapters", content=b"nonsense", headers={"content-type": "multipart/form-data; boundary=x"}
            ).status_code
            == 400
        )
        assert http.get("/v1/adapters?limit=0").status_code == 400
        assert http.get("/nowhere").json()["error"]["code"] == "not_found"
        assert http.put("/generate").status_code == 405
        assert http.post("/generate", json={"inputs": "x", "parameters": {"max_new_tokens": 2}}).status_code == 200


def test_every_route_but_the_probes_needs_a_key(live: Live) -> None:
    with live.http() as http:
        routes = http.get("/openapi.json").json()["paths"]
    assert len(routes) > 10
    with live.http(None) as http:
        for path, operations in routes.items():
            for method in operations:
                status = http.request(method, path.replace("{name}", "x").replace("{reference}", "x")).status_code
                assert status == 200 if path in ("/livez", "/readyz") else status == 401, path
        for trick in ("//v1/models", "/v1/../v1/models", "/livez/../v1/models", "/%761/models", "/v1/models/", "/LIVEZ"):
            assert http.get(trick, headers={"host": "livez", "x-original-url": "/livez"}).status_code == 401, trick


def metric(http: httpx.Client, name: str) -> float:
    lines = http.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def test_a_client_that_leaves_frees_its_rows(live: Live) -> None:
    with live.client() as client, live.http() as http:
        for _ in range(3):
            stream = client.generate_stream("Hello", adapter="plain", max_new_tokens=480, ignore_eos_token=True)
            next(stream)
            stream.close()
        wait_for(lambda: metric(http, "medley_requests_running") == 0)


def test_deleting_an_adapter_in_use_lets_it_finish(live: Live, adapters: dict[str, Path]) -> None:
    with live.client() as client:
        client.adapters.push(adapters["plain"], "doomed")
        stream = client.generate_stream("Hello", adapter="doomed", max_new_tokens=60, ignore_eos_token=True)
        next(stream)
        assert client.adapters.delete("doomed") == 1
        with pytest.raises(ApiError):
            client.generate("Hello", adapter="doomed")
        assert len(list(stream)) == 59


def test_the_engine_may_be_killed_under_load(live: Live) -> None:
    started = asyncio.Event()

    async def ask(client: AsyncMedley, adapter: str) -> str:
        try:
            async for _ in client.generate_stream("Hello", adapter=adapter, max_new_tokens=480, ignore_eos_token=True):
                started.set()
        except ApiError as error:
            return error.code
        return "finished"

    async def load() -> list[str]:
        async with AsyncMedley(live.url, live.keys["acme"]) as client:
            tasks = [asyncio.create_task(ask(client, NAMES[index % 3])) for index in range(8)]
            await started.wait()
            live.child("server.engine.process").kill()
            return list(await asyncio.wait_for(asyncio.gather(*tasks), 60))

    with live.http() as http:
        before = metric(http, "medley_engine_restarts_total")
    codes = asyncio.run(load())
    assert set(codes) <= {"engine_restarting", "finished"}
    assert "engine_restarting" in codes
    with live.http() as http:
        assert http.get("/livez").status_code == 200
        wait_for(lambda: http.get("/readyz").status_code == 200)
        reply = http.post("/generate", json={"inputs": "Hello", "parameters": {"adapter_id": "plain", "max_new_tokens": 4}})
        assert reply.status_code == 200
        assert metric(http, "medley_engine_restarts_total") == before + 1


def test_the_lowering_process_may_be_killed(live: Live, adapters: dict[str, Path]) -> None:
    live.child("server.adapters.lowering_process").kill()
    with live.client() as client:
        assert client.adapters.push(adapters["dora"], "after-the-kill").facts["rank"] == 4


TOY = '''
"""A method that exists in this test only: every output of one module times a number."""

from server.adapters.ir import Program
from server.adapters.lower.method import COMMON_FIELDS, Method, number


def lower(source, base):
    program = Program()
    for spec in source.sites("toy_", ("linear",)):
        factor = source.take(spec.name, "toy_factor", (spec.out_features,))
        if factor is not None:
            program.linear(spec.name).out_scale = factor * source.config["gain"]
    return program


METHOD = Method("TOY", "an output scale", {**COMMON_FIELDS, "gain": number(0, 10)}, lower)
'''


@pytest.fixture(scope="module")
def own(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of this module's own, with a method more; the last test ends it."""
    directory = tmp_path_factory.mktemp("own")
    for package in ("server", "adapter_store"):
        shutil.copytree(ROOT / package, directory / "tree" / package)
    (directory / "tree" / "server" / "adapters" / "lower" / "peft" / "toy.py").write_text(TOY)
    with live_server(model, directory / "data", env={"PYTHONPATH": str(directory / "tree"), "PYTHONSAFEPATH": "1"}) as server:
        yield server


def test_a_new_method_is_one_new_file(own: Live, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "TOY", "gain": 3.0}))
    factor = {"base_model.model.model.layers.0.mlp.down_proj.toy_factor": np.ones(32, "f4")}
    save_file(factor, tmp_path / "adapter_model.safetensors")
    ask = {"max_new_tokens": 10, "ignore_eos_token": True}
    with own.client() as client:
        assert client.adapters.push(tmp_path, "toy").facts["method"] == "TOY"
        assert client.generate("Hello", adapter="toy", **ask).text != client.generate("Hello", **ask).text


def test_a_signal_drains_and_exits_cleanly(own: Live) -> None:
    process = own.process()
    with own.client() as client:
        stream = client.generate_stream("Hello", max_new_tokens=300, ignore_eos_token=True)
        next(stream)
        process.send_signal(signal.SIGTERM)
        assert len(list(stream)) == 299
    process.wait(60)
    log = (own.data_dir / "server.log").read_text()
    for line in log.splitlines():
        if line.startswith("{"):
            json.loads(line)
    assert "Traceback" not in log
