"""Program files stay under their budget, in use they stay, and with an adapter its own go."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from server.adapters.identity import program_id
from server.adapters.program_files import ProgramFiles


@pytest.fixture
def released() -> list[str]:
    """Programs of deleted adapters whose last user went."""
    return []


@pytest.fixture
def files(tmp_path: Path, released: list[str]) -> ProgramFiles:
    made = ProgramFiles(tmp_path / "programs", 100, released.append)
    made.open({})
    return made


def use(files: ProgramFiles, name: str, digests: frozenset[str], since: float | None = None) -> AbstractContextManager[None]:
    """As a request does that asks the store for the adapters now."""
    return files.using(name, digests, time.monotonic() if since is None else since)


def add(files: ProgramFiles, name: str, *digests: str, nbytes: int = 40) -> Path:
    with use(files, name, frozenset(digests)):
        assert files.find(name) is None
        path = files.path(name)
        path.write_bytes(b"x" * nbytes)
        files.add(name, {"size": nbytes})
    return path


def found(files: ProgramFiles, name: str) -> Path | None:
    with use(files, name, frozenset()):
        return files.find(name)


def test_the_least_recently_asked_for_go_first(files: ProgramFiles) -> None:
    first, second = add(files, "first", "a"), add(files, "second", "a")
    assert found(files, "first") == first
    assert add(files, "third", "a").exists()
    assert files.nbytes == 80
    assert (first.exists(), second.exists(), found(files, "second")) == (True, False, None)
    with use(files, "first", frozenset("a")):
        add(files, "fourth", "a")
        add(files, "fifth", "a")
        assert first.exists()
    assert add(files, "huge", "a", nbytes=200).exists(), "the newest is needed, whatever its size"
    assert not first.exists()


def test_what_is_made_of_an_adapter_goes_with_it(files: ProgramFiles, released: list[str]) -> None:
    first, second = add(files, "first", "a", "b"), add(files, "second", "b", "c")
    with use(files, "first", frozenset("ab")), use(files, "first", frozenset("ab")):
        assert files.forget("a") == [], "in use"
        assert first.exists()
    assert (first.exists(), released) == (False, ["first"])
    assert (files.forget("a"), second.exists()) == ([], True)
    assert (files.forget("b"), second.exists(), files.nbytes) == (["second"], False, 0)


def test_what_is_pushed_again_while_it_is_used_stays(files: ProgramFiles, released: list[str]) -> None:
    path = add(files, "made", "a", "b")
    with use(files, "made", frozenset("ab")):
        files.forget("a")
        files.keep("a")
    assert (path.exists(), released) == (True, [])
    with use(files, "made", frozenset("ab")):
        files.forget("a")
        with use(files, "made", frozenset("ab")):
            """Pushed again on another replica: the store gives it once more."""
    assert (path.exists(), released) == (True, [])


def test_a_request_that_found_an_adapter_before_it_was_deleted_leaves_nothing(files: ProgramFiles, released: list[str]) -> None:
    asked = time.monotonic()
    assert files.forget("a") == []
    with use(files, "made", frozenset("ab"), asked):
        path = files.path("made")
        path.write_bytes(b"x")
        files.add("made")
        assert files.find("made") == path
    assert (path.exists(), released) == (False, ["made"])


def test_an_adapter_deleted_while_its_program_is_made_takes_it_along(files: ProgramFiles, released: list[str]) -> None:
    with use(files, "made", frozenset("ab")):
        assert files.forget("a") == []
        path = files.path("made")
        path.write_bytes(b"x")
        files.add("made")
        assert path.exists(), "the request that wanted it runs on it"
    assert (path.exists(), released, files.nbytes) == (False, ["made"], 0)


def test_a_program_that_nobody_waits_for_any_more_is_not_kept(files: ProgramFiles, released: list[str]) -> None:
    with use(files, "made", frozenset("a")):
        pass
    path = files.path("made")
    path.write_bytes(b"x")
    files.add("made")
    assert (path.exists(), files.nbytes, released) == (False, 0, [])


def test_a_file_that_somebody_removed_is_made_again(files: ProgramFiles) -> None:
    path = add(files, "made", "a")
    path.unlink()
    assert found(files, "made") is None
    with use(files, "made", frozenset("a")):
        path.write_bytes(b"xy")
        files.add("made")
        assert (files.find("made"), files.nbytes) == (path, 2)


def test_a_file_that_is_of_no_use_is_made_again(files: ProgramFiles) -> None:
    path = add(files, "made", "a")
    with use(files, "made", frozenset("a")):
        files.discard("made")
        assert (path.exists(), files.find("made"), files.nbytes) == (False, None, 0)
        path.write_bytes(b"xyz")
        files.add("made", {})
        assert (files.find("made"), files.nbytes) == (path, 3)
    files.discard("unknown")


def test_facts_are_remembered_as_long_as_the_program(files: ProgramFiles) -> None:
    add(files, "made", "a")
    assert files.facts("made") == {"size": 40}
    files.forget("a")
    files.remember("made", {})
    assert files.facts("made") is None


def test_what_an_earlier_process_left_is_taken_over_or_removed(tmp_path: Path) -> None:
    for age, name in enumerate(("new.safetensors", "old.safetensors", "gone.safetensors", ".new.safetensors.17", "two.txt")):
        (tmp_path / name).write_bytes(b"x" * 40)
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "composites").mkdir()
    (tmp_path / "composites" / "two.safetensors").write_bytes(b"x")
    files = ProgramFiles(tmp_path, 100)
    files.open({"old": "a", "new": "b", "missing": "c", "two": "d"})
    assert {path.name for path in tmp_path.iterdir()} == {"old.safetensors", "new.safetensors"}
    assert files.nbytes == 80
    add(files, "more", "e")
    assert (found(files, "old"), found(files, "new") is None) == (None, False), "the oldest goes first"
    assert files.forget("b") == ["new"]


def test_a_program_id_covers_all_that_changes_what_is_computed() -> None:
    plain = program_id((("a", 1.0),), "base")
    assert plain == program_id((("a", 1),), "base", drop=0)
    others = [
        program_id((("a", 0.5),), "base"),
        program_id((("a", 1.0),), "other"),
        program_id((("a", 1.0),), "base", drop=1),
        program_id((("a", 1.0),), "base", version=0),
        program_id((("a", 1.0), ("b", 1.0)), "base"),
        program_id((("b", 1.0), ("a", 1.0)), "base"),
    ]
    assert len({plain, *others}) == 7
