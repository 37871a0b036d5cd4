"""Uploads that are killed at every step in turn. Run as a program: it forks one child for each step, and says how they ended.

A step is whatever can be seen on the disk or in the database: a write, a sync, a rename, a link, a directory, an SQL statement, a commit.
The child kills itself just before its step, or half-way through it if the step is a write.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event

import adapter_store.uploads
from adapter_store.store import Store
from tests.adapter_store.uploads import good

CHUNK = 40


def push_directly(store: Store) -> None:
    """All files in one upload, as a form sends them."""
    with store.begin_upload() as staging:
        for name, content in good(1).items():
            with staging.open(name) as writer:
                for start in range(0, len(content), CHUNK):
                    writer.write(content[start : start + CHUNK])
        store.commit("acme", "bot", staging.finish(), {"rank": 2})


def push_by_blobs(store: Store) -> None:
    """Each file as a resumable upload in two pieces, then an adapter of them."""
    claimed = {}
    for name, content in good(1).items():
        upload = store.begin_blob("acme")
        for piece in (content[: len(content) // 2], content[len(content) // 2 :]):
            with store.append_blob("acme", upload, store.blob_offset("acme", upload)) as writer:
                writer.write(piece)
        claimed[name] = hashlib.sha256(content).hexdigest()
        store.finish_blob("acme", upload, claimed[name])
    with store.begin_upload() as staging:
        store.stage_blobs("acme", claimed, staging)
        store.commit("acme", "bot", staging.finish(), {"rank": 2})


PUSHES: dict[str, Callable[[Store], None]] = {"directly": push_directly, "by blobs": push_by_blobs}


class Steps:
    """Counts steps, remembers what they were, and ends the process at the wanted one."""

    def __init__(self, last: int) -> None:
        self.seen: list[tuple[str, str]] = []
        self._last = last

    def take(self, kind: str, what: object) -> bool:
        """True when this is the last step and half of it is still to be done."""
        self.seen.append((kind, str(what)))
        if len(self.seen) < self._last:
            return False
        if kind == "write":
            return True
        return self.die()

    def die(self) -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    def watch(self) -> None:
        """From now on every step of this process counts."""
        for name in ("mkdir", "rmdir", "unlink", "link", "replace", "rename"):
            setattr(os, name, self._watched(name, getattr(os, name)))
        sync = os.fsync
        os.fsync = lambda fd: (self.take("fsync", os.readlink(f"/proc/self/fd/{fd}")), sync(fd))[1]  # type: ignore[assignment]
        open_file = io.open
        io.open = lambda *args, **kwargs: _Watched(open_file(*args, **kwargs), self)  # type: ignore[assignment, misc]
        adapter_store.uploads.FileIO = lambda *args, **kwargs: _Watched(io.FileIO(*args, **kwargs), self)  # type: ignore[misc, assignment]
        event.listen(Engine, "before_cursor_execute", lambda _c, _cursor, sql, *_: self.take("sql", sql))
        event.listen(Engine, "commit", lambda _: self.take("commit", ""))

    def _watched(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.take(name, " ".join(str(arg) for arg in args[:2]))
            return function(*args, **kwargs)

        return call


class _Watched:
    """A file of which every write is a step and reaches the disk at once."""

    def __init__(self, file: Any, steps: Steps) -> None:
        self._file = file
        self._steps = steps

    def write(self, data: bytes) -> int:
        if self._steps.take("write", self._file.name):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._steps.die()
        written: int = self._file.write(data)
        self._file.flush()
        return written

    def __enter__(self) -> _Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def main(template: Path, root: Path, push: Callable[[Store], None]) -> None:
    """Make ``root/<step>`` a copy of the store in which a push died at that step, for every step that there is."""
    report = root / "steps.json"
    for step in itertools.count(1):
        directory = root / str(step)
        shutil.copytree(template, directory)
        child = os.fork()
        if child == 0:
            store = Store.open(directory)
            steps = Steps(step)
            steps.watch()
            push(store)
            with open(report, "w", encoding="utf-8") as file:
                json.dump(steps.seen, file)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            raise SystemExit(os.WEXITSTATUS(status))
        assert os.WTERMSIG(status) == signal.SIGKILL, status


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), PUSHES[sys.argv[3]])
