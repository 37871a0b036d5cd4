"""The client and the command against a real server."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from medley_client import ApiError, AsyncMedley, CannotConnect, Medley, MedleyError
from medley_client.cli import console, main
from medley_client.convert import convert
from medley_client.files import find_files
from tests.clients.conftest import Command
from tests.conftest import TinyModels
from tests.live import Live


def test_push_with_progress_list_show_generate_delete(live: Live, adapter: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    with live.client() as client:
        pushed = client.adapters.push(adapter, "bot", progress=lambda *state: seen.append(state))
        assert (pushed.version, pushed.facts["method"]) == ("v1", "LORA")
        assert [what for what, done, total in seen if done == total > 0] == ["hashing", "sending", "sending"]
        assert [item.name for item in client.adapters.list()] == ["bot"]
        assert client.adapters.show("bot").versions[0].digest == pushed.digest
        assert client.models()[-1] == "bot"
        whole = client.generate("Hello", adapter="bot", max_new_tokens=6, ignore_eos_token=True)
        tokens = list(client.generate_stream("Hello", adapter="bot", max_new_tokens=6, ignore_eos_token=True))
        assert [token.id for token in tokens] == [token.id for token in whole.tokens]
        assert (tokens[-1].generated_text, tokens[-1].finish_reason) == (whole.text, "length")
        assert isinstance(client.chat([{"role": "user", "content": "Hi"}], adapter="bot", max_tokens=3), str)
        assert client.adapters.delete("bot") == 1


def test_async_twin(live: Live, adapter: Path) -> None:
    async def use() -> None:
        async with AsyncMedley(live.url, live.keys["globex"]) as client:
            await client.adapters.push(adapter, "bot")
            assert [item.name for item in await client.adapters.list()] == ["bot"]
            whole = await client.generate("Hello", adapter="bot", max_new_tokens=6)
            tokens = [token async for token in client.generate_stream("Hello", adapter="bot", max_new_tokens=6)]
            assert tokens[-1].generated_text == whole.text
            with pytest.raises(ApiError) as refused:
                await client.adapters.show("nobody")
            assert (refused.value.status, refused.value.code) == (404, "adapter_not_found")
            assert refused.value.request_id
            await client.adapters.delete("bot")

    asyncio.run(use())


def test_archives_can_be_pushed(live: Live, adapter: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bot.tar.gz", "w:gz") as archive:
        archive.add(adapter, "bot")
    with live.client() as client:
        assert client.adapters.push(tmp_path / "bot.tar.gz", "bot").digest == client.adapters.push(adapter, "bot").digest
        client.adapters.delete("bot")


def test_command_line(command: Command, adapter: Path) -> None:
    assert command("ls") == (0, "no adapters yet; push one with: medley push DIR\n", "")
    status, out, _ = command("push", str(adapter))
    assert status == 0
    assert out.startswith("my-bot@v1  LORA rank 4")
    status, out, _ = command("ls", "--json")
    assert [item["name"] for item in json.loads(out)] == ["my-bot"]
    assert "my-bot" in command("ls")[1]
    assert "rank 4" in command("show", "my-bot")[1]
    status, out, err = command("generate", "Hello", "--adapter", "my-bot", "--max-new-tokens", "5")
    assert status == 0
    assert "tokens/s" in err
    assert json.loads(command("generate", "Hello", "--json", "--max-new-tokens", "5")[1])["tokens"] <= 5
    assert command("rm", "my-bot")[:2] == (0, "deleted 1 version of my-bot\n")
    status, _, err = command("rm", "my-bot")
    assert status == 1
    assert "there is no adapter 'my-bot'" in err
    assert "request id" in err


def tuned_model(base: Path, directory: Path) -> Path:
    """A fine-tuned model as transformers saves it: the base with its last layer changed."""
    model = AutoModelForCausalLM.from_pretrained(base)
    for name, parameter in model.named_parameters():
        if ".1." in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(directory)
    return directory


def test_fine_tuned_models_are_pushed_exact_or_compressed(
    command: Command, live: Live, tiny_models: TinyModels, tmp_path: Path
) -> None:
    directory = tuned_model(tiny_models("llama"), tmp_path / "tuned")
    status, _, err = command("push", str(directory))
    assert status == 1
    assert "--rank N" in err
    assert "--exact" in err
    status, out, _ = command("push", str(directory), "--rank", "3")
    assert status == 0
    assert out.startswith("tuned@v1  FINE_TUNE rank 3")
    assert "rank 3, relative error 0." in out
    assert "relative error 0." in command("show", "tuned")[1]
    with live.client() as client:
        exact = client.adapters.push(directory, "tuned", exact=True)
        assert (exact.version, exact.facts["rank"], "notes" in exact.facts) == ("v2", 0, False)
        with pytest.raises(MedleyError, match="--rank N"):
            client.adapters.push(directory, "tuned", rank=3, exact=True)
    assert command("rm", "tuned")[0] == 0


def test_options_of_fine_tuned_models_are_for_them_alone(command: Command, adapter: Path, tmp_path: Path) -> None:
    status, _, err = command("push", str(adapter), "--rank", "3")
    assert status == 1
    assert "fine-tuned models" in err
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    status, _, err = command("push", str(tmp_path), "--rank", "3")
    assert status == 1
    assert "max_shard_size" in err


def test_command_line_shows_every_fault(command: Command, adapter: Path, tmp_path: Path) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((adapter / file).read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"use_qalora": True, "made_up": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    status, _, err = command("push", str(tmp_path), "--name", "bad")
    assert status == 1
    assert "use_qalora" in err
    assert "made_up" in err


def test_nobody_there_is_status_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MEDLEY_URL", "http://127.0.0.1:9")
    assert main(["ls"]) == 3
    assert "medley serve" in capsys.readouterr().err
    with pytest.raises(CannotConnect):
        Medley("http://127.0.0.1:9").models()


def test_usage_and_help() -> None:
    command = [sys.executable, "-m", "medley_client.cli"]
    assert subprocess.run([*command, "--help"], capture_output=True).returncode == 0
    assert subprocess.run(command, capture_output=True).returncode == 2
    for arguments, status in ((["push", "--help"], 0), (["nonsense"], 2), (["push"], 2)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == status


def test_help_of_every_command_fits_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert {"push", "pull", "tag", "rollback", "alias", "pin", "load"} <= set(commands)
    for command in commands:
        if command != "serve":
            with pytest.raises(SystemExit) as ended:
                main([command, "--help"])
            assert ended.value.code == 0
            assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("seconds", "shown"), [(5, "5 s ago"), (300, "5 min ago"), (7200, "2 h ago"), (900000, "10 days ago"), (-5, "0 s ago")]
)
def test_how_long_ago(seconds: float, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1e9)
    assert console.ago(1e9 - seconds) == shown
    assert console.ago(None) == "never"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no adapter_config.json and no adapter_model.safetensors"),
        (["adapter_config.json", "adapter_model.bin"], "medley convert"),
        (["adapter_config.json", "pytorch_adapter.bin"], "pytorch_adapter.bin.*medley convert"),
        (["adapter_config.json", "adapter.safetensors", "head_config.json", "pytorch_model_head.bin"], "medley convert"),
    ],
)
def test_incomplete_directories_are_explained_before_anything_is_sent(files: list[str], message: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).write_bytes(b"{}")
    with pytest.raises(MedleyError, match=message):
        Medley("http://127.0.0.1:9").adapters.push(tmp_path, "x")


class Script(BaseHTTPRequestHandler):
    """Answers with what its server was given, one reply after the other."""

    def do_GET(self) -> None:
        status, headers = self.server.replies.pop(0)  # type: ignore[attr-defined]
        body = b'{"data": []}' if status == 200 else b'{"error": {"message": "later", "code": "overloaded"}}'
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@pytest.mark.parametrize(
    ("replies", "left", "works"),
    [
        ([(429, {"retry-after-ms": "1"}), (503, {"retry-after": "0"}), (200, {})], 0, True),
        ([(429, {"retry-after-ms": "1"})] * 4, 1, False),
        ([(429, {"x-should-retry": "false"}), (200, {})], 1, False),
        ([(400, {}), (200, {})], 1, False),
        ([(503, {"retry-after": "9999"}), (200, {})], 1, False),
    ],
)
def test_retries_obey_the_server(replies: list[tuple[int, dict[str, str]]], left: int, works: bool) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    server.replies = list(replies)  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with Medley(f"http://127.0.0.1:{server.server_port}") as client:
        if works:
            assert client.models() == []
        else:
            with pytest.raises(ApiError, match="later"):
                client.models()
    assert len(server.replies) == left  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def test_convert(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    torch.save({"a": shared, "b": shared, "c": shared[:2].T}, tmp_path / "adapter_model.bin")
    written = convert(tmp_path)
    assert written == [tmp_path / "adapter_model.safetensors"]
    loaded = load_file(written[0])
    assert torch.equal(loaded["a"], loaded["b"])
    assert torch.equal(loaded["c"], shared[:2].T)


def test_convert_gives_adapterhub_tensors_one_name(tmp_path: Path) -> None:
    shared = torch.randn(3, 4)
    torch.save(
        {"layers.0.pool.x": shared, "pool.x": shared, "y": shared[:1], "z": shared.clone()}, tmp_path / "pytorch_adapter.bin"
    )
    written = convert(tmp_path)
    assert written == [tmp_path / "adapter.safetensors"]
    assert set(load_file(written[0])) == {"pool.x", "y", "z"}


@pytest.mark.parametrize(
    "files",
    [
        ["adapter_config.json", "adapter_model.safetensors", "labels.json"],
        ["adapter_config.json", "adapter.safetensors", "head_config.json", "model_head.safetensors"],
        ["adapter_fusion_config.json", "model_adapter_fusion.safetensors"],
    ],
)
def test_what_is_sent_of_a_directory(files: list[str], tmp_path: Path) -> None:
    for file in (*files, "tokenizer.json", "pytorch_adapter.bin"):
        (tmp_path / file).write_bytes(b"{}")
    assert [file.name for file in find_files(tmp_path)] == files


def test_convert_runs_no_code(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (canary,)

    torch.save({"a": Bomb()}, tmp_path / "adapter_model.bin")
    with pytest.raises(MedleyError, match="could run code"):
        convert(tmp_path)
    assert not canary.exists()
    (tmp_path / "adapter_model.bin").write_bytes(b"nonsense")
    with pytest.raises(MedleyError):
        convert(tmp_path)
    with pytest.raises(MedleyError, match="has none of"):
        convert(tmp_path / "nowhere")


def test_what_others_wrote_does_not_steer_the_terminal() -> None:
    assert console.printable("a\x1b[31m\x9b2J\tb\r\nüß") == "a\ufffd[31m\ufffd2J\tb\ufffd\nüß"
    assert console.some(["a", "b"]) == "a, b"
    assert console.some(["x"] * 20).endswith("(20 in all)")
