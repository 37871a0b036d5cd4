"""A server of its own for a demo or a benchmark: started on a free loopback port, stopped at the end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import httpx
from rich.console import Console


class ServerFailed(Exception):
    """The server ended, or did not become ready; the message has the end of its log."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(data_dir: Path, *flags: str, port: int | None = None, env: Mapping[str, str] | None = None) -> Iterator[str]:
    """The address of a server that is ready. Its log is ``data_dir/server.log``. Raises ServerFailed."""
    data_dir.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    log = data_dir / "server.log"
    command = [sys.executable, "-m", "server", "--port", str(port), "--data-dir", str(data_dir), *flags]
    with log.open("w") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env={**os.environ, **(env or {})})
    try:
        yield _wait_until_ready(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def keep_serving(console: Console, *commands: str) -> NoReturn:
    """Show commands to try, and stay until Ctrl-C."""
    console.print("\ntry it:", style="bold")
    for command in commands:
        console.print(f"  {command}", markup=False, soft_wrap=True)
    console.print("serving; Ctrl-C stops")
    while True:
        time.sleep(3600)


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float = 180.0) -> str:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerFailed(f"the server ended with status {process.returncode}:\n{log.read_text()[-2000:]}")
        try:
            if httpx.get(f"{url}/readyz", timeout=2.0).status_code == 200:
                return url
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise ServerFailed(f"the server was not ready within {timeout_s:.0f} s:\n{log.read_text()[-2000:]}")
