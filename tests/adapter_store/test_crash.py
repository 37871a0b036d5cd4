"""A push that is killed at any step leaves the adapter whole or absent, can be made again, and leaves nothing that a sweep does not find."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adapter_store.errors import AdapterNotFound
from adapter_store.store import Store
from tests.adapter_store.crashing import PUSHES
from tests.adapter_store.test_store import contents, push, read

DAYS = 3 * 24 * 3600.0


def whole_or_absent(store: Store) -> bool:
    """Whether the adapter is there; then it must be all there."""
    try:
        version = store.resolve("acme", "bot")
    except AdapterNotFound:
        return False
    assert (version.number, read(store, version)) == (1, contents(1))
    return True


def check_what_is_left(store: Store, directory: Path) -> None:
    """On the disk: the catalog, and the blobs of versions."""
    wanted = {
        hashlib.sha256(content).hexdigest()
        for name in ("bot", "before")
        for content in read(store, store.resolve("acme", name)).values()
    }
    left = {path.name for path in directory.rglob("*") if path.is_file() and not path.name.startswith("catalog.sqlite")}
    assert left == wanted
    assert [path for name in ("uploads", "partial", "checkouts") for path in (directory / name).iterdir()] == []


def check_order(steps: list[tuple[str, str]]) -> None:
    """Before the version is committed, each blob was written, synced, renamed, and its directory synced, in this order."""
    commit = max(place for place, (kind, _) in enumerate(steps) if kind == "commit")
    renames = [(place, *what.split()) for place, (kind, what) in enumerate(steps) if kind == "replace"]
    new = set(contents(1).values()) - set(contents(2).values())
    assert {Path(target).name for _, _, target in renames} == {hashlib.sha256(content).hexdigest() for content in new}
    for place, hidden, target in renames:
        written = max(index for index, step in enumerate(steps) if step == ("write", hidden))
        synced = steps.index(("fsync", hidden))
        directory_synced = steps.index(("fsync", str(Path(target).parent)), place)
        assert written < synced < place < directory_synced < commit
        if ("mkdir", f"{Path(target).parent} 511") in steps[:place]:
            assert ("fsync", str(Path(target).parents[1])) in steps[:commit]


@pytest.mark.parametrize("way", PUSHES)
def test_killed_at_every_step(way: str, tmp_path: Path) -> None:
    template, root = tmp_path / "template", tmp_path / "killed"
    root.mkdir()
    store = Store.open(template)
    push(store, "acme", "before", 2)
    store.close()
    subprocess.run(
        [sys.executable, "-m", "tests.adapter_store.crashing", template, root, way], check=True, cwd=Path(__file__).parents[2]
    )
    steps = [tuple(step) for step in json.loads((root / "steps.json").read_text())]
    assert len(steps) >= 30
    assert {"write", "fsync", "replace", "mkdir", "unlink", "sql", "commit"} <= {kind for kind, _ in steps}
    check_order(steps)

    survived = []
    for step in range(1, len(steps) + 2):
        directory = root / str(step)
        now = 0.0
        store = Store.open(directory, clock=lambda: time.time() + now)  # noqa: B023 - moved on purpose
        survived.append(whole_or_absent(store))
        PUSHES[way](store)
        assert whole_or_absent(store)
        now = DAYS
        store.sweep()
        check_what_is_left(store, directory)
        store.close()
    # Once it is there it stays.
    assert survived == sorted(survived)
    assert survived[0] is False
    assert survived[-1] is True
