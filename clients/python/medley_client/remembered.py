"""Uploads that were begun, kept in the user's cache directory, so that a push that was cut off goes on where it stopped.

One small file each, named by server and digest, that holds the upload's id. Whose key it was begun with is not kept: the server knows.
"""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

KEPT_S = 24 * 3600.0
"""As long as servers keep an upload that nobody finishes."""


def cache_directory() -> Path:
    """Where this user's programs keep what they can do without: XDG_CACHE_HOME, or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medley" / "uploads"


class RememberedUploads:
    """The uploads to one server. Where the directory cannot be written to, nothing is remembered: an upload works without."""

    def __init__(self, server: str, directory: Path | None = None) -> None:
        self._server = server
        self._directory = directory or cache_directory()

    def recall(self, digest: str) -> str | None:
        """The id of the upload that was begun for these bytes."""
        self._drop_old()
        with suppress(OSError):
            return self._file(digest).read_text(encoding="ascii", errors="replace") or None
        return None

    def remember(self, digest: str, upload: str) -> None:
        """This upload was begun for these bytes."""
        with suppress(OSError):
            self._directory.mkdir(parents=True, exist_ok=True)
            self._file(digest).write_text(upload, encoding="ascii")

    def forget(self, digest: str) -> None:
        """It is finished, or gone."""
        with suppress(OSError):
            self._file(digest).unlink()

    def _file(self, digest: str) -> Path:
        return self._directory / hashlib.sha256(f"{self._server}\n{digest}".encode()).hexdigest()

    def _drop_old(self) -> None:
        with suppress(OSError):
            for path in self._directory.iterdir():
                if path.stat().st_mtime < time.time() - KEPT_S:
                    path.unlink(missing_ok=True)
