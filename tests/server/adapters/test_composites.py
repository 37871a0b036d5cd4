"""Composite files stay under their budget, in use they stay, and with an adapter its own go."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.adapters.composites import Composites
from server.adapters.identity import program_id


@pytest.fixture
def composites(tmp_path: Path) -> Composites:
    (tmp_path / "composites").mkdir()
    (tmp_path / "composites" / "stale.safetensors").write_bytes(b"x")
    made = Composites(tmp_path / "composites", 100)
    made.clear()
    assert not list((tmp_path / "composites").iterdir())
    return made


def add(composites: Composites, name: str, *digests: str, nbytes: int = 40) -> Path:
    with composites.using(name, frozenset(digests)):
        assert composites.find(name) is None
        path = composites.path(name)
        path.write_bytes(b"x" * nbytes)
        composites.add(name)
    return path


def found(composites: Composites, name: str) -> Path | None:
    with composites.using(name, frozenset()):
        return composites.find(name)


def test_the_least_recently_asked_for_go_first(composites: Composites) -> None:
    first, second = add(composites, "first", "a"), add(composites, "second", "a")
    assert found(composites, "first") == first
    assert add(composites, "third", "a").exists()
    assert composites.nbytes == 80
    assert (first.exists(), second.exists(), found(composites, "second")) == (True, False, None)
    with composites.using("first", frozenset("a")):
        add(composites, "fourth", "a")
        add(composites, "fifth", "a")
        assert first.exists()
    assert add(composites, "huge", "a", nbytes=200).exists(), "the newest is needed, whatever its size"
    assert not first.exists()


def test_an_adapters_composites_go_with_it(composites: Composites) -> None:
    first, second = add(composites, "first", "a", "b"), add(composites, "second", "b", "c")
    with composites.using("first", frozenset("ab")), composites.using("first", frozenset("ab")):
        assert composites.forget("a") == ["first"]
        assert first.exists()
    assert not first.exists()
    assert (composites.forget("a"), second.exists()) == ([], True)
    with composites.using("second", frozenset("bc")):
        composites.forget("c")
        assert composites.find("second") == second, "asked for again, by who pushed the adapter again"
    assert second.exists()
    assert (composites.forget("b"), second.exists()) == (["second"], False)


def test_an_adapter_deleted_while_its_composite_is_made_takes_it_along(composites: Composites) -> None:
    with composites.using("made", frozenset("ab")):
        assert composites.forget("a") == ["made"]
        path = composites.path("made")
        path.write_bytes(b"x")
        composites.add("made")
        assert path.exists(), "the request that wanted it runs on it"
    assert not path.exists()


def test_a_composite_that_nobody_waits_for_any_more_is_not_kept(composites: Composites) -> None:
    with composites.using("made", frozenset("a")):
        pass
    path = composites.path("made")
    path.write_bytes(b"x")
    composites.add("made")
    assert (path.exists(), composites.nbytes) == (False, 0)


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
