"""Several adapters in one request, through the whole server: schemas, clients, refusals, and what a delete leaves behind."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from peft import IA3Config, LoraConfig

from medley_client import ApiError, AsyncMedley
from medley_client.cli import main
from server.adapters.compose import Part, compose, drop_layers
from server.adapters.ir import Program
from server.adapters.packed import unpack_program
from server.adapters.program_file import read_program, write_program
from server.engine.types import ProgramRef
from tests.conftest import TinyModels
from tests.harness import greedy, load_base_for_lowering, lower_directory, make_engine, run
from tests.live import OPERATOR, Live, Sharing, wait_for
from tests.parity.cases import Case, make_checkpoint
from tests.tiny import tiny_tokenizer

CASES = (
    Case("law", lambda _: LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]), scale=0.3),
    Case("german", lambda _: LoraConfig(r=2, lora_alpha=8, target_modules="all-linear"), scale=0.3),
    Case("short", lambda _: IA3Config(task_type="CAUSAL_LM"), kept=("ia3_l",), scale=0.6),
    Case("long", lambda _: IA3Config(task_type="CAUSAL_LM"), kept=("ia3_l",), scale=0.5),
)
WEIGHTS = {"law": 0.7, "german": -0.5, "short": 1.0}
ASK = {"max_new_tokens": 12, "ignore_eos_token": True}
LAW = {"adapter": "law", "weight": 0.5}


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return {case.name: make_checkpoint(case, "llama", model, directory / case.name, seed=7) for case in CASES}


@pytest.fixture(scope="module")
def live(sharing: Sharing) -> Live:
    return sharing()


@pytest.fixture(scope="module", autouse=True)
def strangers(live: Live, adapters: dict[str, Path]) -> set[str]:
    """Programs that the server holds for other tests; those of this module come after them."""
    programs, _ = held(live)
    live.push(adapters)
    return set(programs)


def expected(model: Path, adapters: dict[str, Path], weights: dict[str, float], drop: int, directory: Path) -> list[int]:
    """What the engine makes of the composition, in this process."""
    base = load_base_for_lowering(model)
    parts = []
    for name, weight in weights.items():
        program: Program = unpack_program(read_program(Path(lower_directory(adapters[name], base, name).path)), base.spec)
        parts.append(Part(drop_layers(program, base.spec, drop), weight))
    path = directory / "composed.safetensors"
    write_program(path, compose(parts, base), program_id="composed", facts={})
    engine = make_engine(model)
    request = greedy("x", tiny_tokenizer()("Hello")["input_ids"], ProgramRef("composed", str(path)), tokens=12)
    result = run(engine, [request])["x"]
    engine.close()
    return result.tokens


def composites(live: Live) -> list[Path]:
    return list(live.data_dir.glob("programs/*/*.safetensors"))


def held(live: Live) -> tuple[dict[str, str], int]:
    """The states of the programs that the server holds, and how many slots of the device are in use as of the last step."""
    with live.http(OPERATOR) as http:
        shown = http.get("/v1/registry").json()
    return {item["program"]: item["state"] for item in shown["programs"]}, shown["engine"]["slots"]["used"]


@pytest.mark.parametrize("drop", [0, 1])
def test_every_client_gets_the_composition(
    drop: int,
    live: Live,
    model: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokens = expected(model, adapters, WEIGHTS, drop, tmp_path)
    text = tiny_tokenizer().decode(tokens, skip_special_tokens=True)
    with live.client() as client:
        whole = client.generate("Hello", adapter=WEIGHTS, adapter_drop=drop, **ASK)
        assert [token.id for token in whole.tokens] == tokens
        stream = client.generate_stream("Hello", adapter=WEIGHTS, adapter_drop=drop, **ASK)
        assert [token.id for token in stream] == tokens
        chatted = client.chat([{"role": "user", "content": "Hi"}], adapter=WEIGHTS, max_tokens=3, adapter_drop=drop)
        assert isinstance(chatted, str)
    named = [{"adapter": name, "weight": weight} for name, weight in WEIGHTS.items()]
    sdk = openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.keys["acme"], max_retries=0)
    extra = {"adapters": named, "adapter_drop": drop, "ignore_eos": True}
    completion = sdk.completions.create(model="base", prompt="Hello", max_tokens=12, temperature=0, extra_body=extra)
    assert completion.choices[0].text == whole.text == text
    monkeypatch.setenv("MEDLEY_URL", live.url)
    monkeypatch.setenv("MEDLEY_API_KEY", live.keys["acme"])
    flags = [part for name, weight in WEIGHTS.items() for part in ("--adapter", f"{name}@v1:{weight}")]
    status = main(["generate", "Hello", "--raw", "--max-new-tokens", "12", "--adapter-drop", str(drop), *flags])
    assert status == 0
    assert text.startswith(capsys.readouterr().out.rstrip("\n"))


def test_one_adapter_with_weight_one_is_the_adapter(live: Live) -> None:
    before = len(composites(live))
    with live.client() as client:
        alone = client.generate("Hello", adapter="law", **ASK)
        assert client.generate("Hello", adapter={"law": 1}, **ASK).tokens == alone.tokens
        assert len(composites(live)) == before
        assert client.generate("Hello", adapter={"law": 0.25}, **ASK).tokens != alone.tokens
    assert len(composites(live)) == before + 1


def test_the_command_refuses_odd_weights(live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MEDLEY_URL", live.url)
    for flags, message in (
        (["law:x"], "not a number"),
        (["law", "law:2"], "given twice"),
        (["law@sha256:0123456789ab:y"], "not a number"),
    ):
        assert main(["generate", "Hello", *(part for flag in flags for part in ("--adapter", flag))]) == 1
        assert message in capsys.readouterr().err


REFUSED = (
    ("/generate", {"adapter_id": "law", "adapters": [LAW]}, 422, "validation", "leave one out"),
    ("/generate", {"merged_adapters": {"ids": ["law"]}}, 422, "validation", "adapters"),
    ("/generate", {"adapters": []}, 422, "validation", "adapters"),
    ("/generate", {"adapters": [LAW] * 9}, 422, "validation", "adapters"),
    ("/generate", {"adapters": [{"adapter": "law", "weight": 11}]}, 422, "validation", "weight"),
    ("/generate", {"adapters": [{"adapter": "law", "factor": 1}]}, 422, "validation", "unknown field"),
    ("/generate", {"adapters": [LAW, {"adapter": "law@v1"}]}, 422, "not_composable", "named twice"),
    (
        "/generate",
        {"adapters": [{"adapter": "short"}, {"adapter": "long"}]},
        422,
        "not_composable",
        "adapters[0] and adapters[1]",
    ),
    ("/generate", {"adapter_id": "law", "adapter_drop": 3}, 422, "not_composable", "2 layers"),
    ("/generate", {"adapter_id": "law", "adapter_drop": -1}, 422, "validation", "adapter_drop"),
    ("/generate", {"adapter_drop": 1}, 400, "invalid_request", "needs an adapter"),
    ("/generate", {"adapters": [LAW, {"adapter": "nobody"}]}, 404, "adapter_not_found", "nobody"),
    ("/generate", {"adapters": [{"adapter": "base"}]}, 400, "invalid_adapter_name", "reserved"),
    ("/v1/completions", {"model": "law", "adapters": [LAW]}, 400, "invalid_request", "'law' and `adapters`"),
    ("/v1/completions", {"adapters": [{"adapter": "short"}, {"adapter": "long"}]}, 422, "not_composable", "down_proj"),
)


@pytest.mark.parametrize(("path", "asked", "status", "code", "message"), REFUSED)
def test_what_does_not_add_up_is_refused(
    path: str, asked: dict[str, Any], status: int, code: str, message: str, live: Live
) -> None:
    body = {"inputs": "x", "parameters": asked} if path == "/generate" else {"prompt": "x", **asked}
    with live.http() as http:
        reply = http.post(path, json=body)
    found = reply.json() if path == "/generate" else reply.json()["error"]
    assert (reply.status_code, found["code"]) == (status, code)
    assert message in str(found)
    if path != "/generate" and code == "not_composable":
        assert len(found["faults"]) == 2, "one for each layer"


def test_a_deleted_part_takes_its_compositions_along(live: Live, adapters: dict[str, Path], strangers: set[str]) -> None:
    def is_rid_of_all() -> bool:
        programs, slots = held(live)
        return programs.keys() <= strangers and slots == list(programs.values()).count("resident")

    with live.client() as client:
        client.adapters.push(adapters["law"], "doomed")
        for name in ("law", "short", "long"):
            client.adapters.delete(name)
        others = set(composites(live))
        weights = {"doomed": 0.5, "german": 0.5}
        before = client.generate("Hello", adapter=weights, **ASK)
        (made,) = set(composites(live)) - others
        stream = client.generate_stream("Hello", adapter=weights, max_new_tokens=60, ignore_eos_token=True)
        next(stream)
        client.adapters.delete("doomed")
        with pytest.raises(ApiError, match="there is no adapter"):
            client.generate("Hello", adapter=weights)
        assert made.exists(), "a file in use stays"
        assert len(list(stream)) == 59
        wait_for(lambda: not made.exists())
        client.generate("Hello", max_new_tokens=2)
        wait_for(is_rid_of_all)
        client.adapters.push(adapters["law"], "law")
        assert client.generate("Hello", adapter={"law": 0.5, "german": 0.5}, **ASK).tokens == before.tokens


def test_many_who_ask_for_one_composition_at_once_get_the_same(live: Live) -> None:
    async def ask() -> list[str]:
        async with AsyncMedley(live.url, live.keys["acme"]) as client:
            found = await asyncio.gather(
                *(client.generate("Hello", adapter={"law": 2, "german": 0.125}, **ASK) for _ in range(8))
            )
            return [item.text for item in found]

    before = len(composites(live))
    assert len(set(asyncio.run(ask()))) == 1
    assert len(composites(live)) == before + 1
