"""Ranges never overlap, whatever comes, goes and slides, and what is free in all is free in one piece after sliding."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.adapters.extents import Extents


def test_extents_merge_when_freed() -> None:
    extents = Extents(100, 10)
    starts = [extents.allocate(25) for _ in range(3)]
    assert starts == [0, 30, 60]
    assert extents.allocate(20) is None
    for start in (30, 0, 60):
        extents.release(start, 25)
    assert extents.allocate(100) == 0


@settings(max_examples=100)
@given(actions=st.lists(st.tuples(st.sampled_from(["allocate", "release", "slide"]), st.integers(0, 40)), max_size=60))
def test_whatever_happens(actions: list[tuple[str, int]]) -> None:
    extents = Extents(107, 5)
    held: dict[int, int] = {}
    for action, number in actions:
        if action == "allocate" and number:
            start = extents.allocate(number)
            if start is not None:
                held[start] = number
        elif action == "release" and held:
            start = sorted(held)[number % len(held)]
            extents.release(start, held.pop(start))
        elif action == "slide" and (slide := extents.slide()) is not None:
            assert slide.to < slide.start
            assert slide.length == extents.rounded(held[slide.start])
            held[slide.to] = held.pop(slide.start)
        ends = [0]
        for start, length in sorted(held.items()):
            assert start >= ends[-1]
            ends.append(start + extents.rounded(length))
        assert ends[-1] <= extents.capacity == 105
        assert extents.used == sum(extents.rounded(length) for length in held.values())
    while extents.slide() is not None:
        pass
    if free := extents.capacity - extents.used:
        assert extents.allocate(free) == extents.capacity - free
