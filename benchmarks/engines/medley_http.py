"""Medley over real HTTP: a server of its own, one request a prompt. Option ``bank_bytes`` bounds what is resident."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from benchmarks.engines.protocol import Engine, Setup, drive
from benchmarks.over_http import seconds_for_all
from benchmarks.work import Job
from examples.serving import running_server
from medley_client import Medley


class MedleyHttp(Engine):
    """A server whose data directory stays, so that adapters are pushed and lowered once."""

    def __init__(self, setup: Setup) -> None:
        self._open = ExitStack()
        room = str(setup.options.get("bank_bytes", 4 << 30))
        flags = ("--model", setup.base, "--dtype", setup.dtype, "--bank-bytes", room, "--host-bytes", "4GiB")
        data = Path(setup.cache) / f"server-{room}"
        self._url = self._open.enter_context(running_server(data, *flags))
        with Medley(self._url, timeout=600) as client:
            for adapter in setup.adapters:
                client.adapters.push(Path(adapter), Path(adapter).name)

    def run(self, job: Job) -> float:
        def body(index: int) -> dict[str, object]:
            adapter = job.adapters[index]
            return {
                "model": Path(adapter).name if adapter else "base",
                "prompt": job.prompts[index],
                "max_tokens": job.new_tokens,
                "temperature": 0,
                "ignore_eos": True,
            }

        seconds, replies = seconds_for_all(self._url, "/v1/completions", [body(index) for index in range(len(job.prompts))])
        if any(reply["usage"]["completion_tokens"] != job.new_tokens for reply in replies):
            raise RuntimeError("a request ended early")
        return seconds

    def close(self) -> None:
        self._open.close()


if __name__ == "__main__":
    drive(MedleyHttp)
