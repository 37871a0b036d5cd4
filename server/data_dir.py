"""The data directory: one server at a time, since each takes what it finds there for its own."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from server.config import ConfigError


def claim(directory: Path) -> IO[str]:
    """Make the directory, and hold it until the returned file is closed or the process ends. Raises ConfigError."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = (directory / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise ConfigError(
            f"another server uses {directory}; give this one a --data-dir of its own (replicas share --catalog-url and --blobs-url)"
        ) from error
    return lock
