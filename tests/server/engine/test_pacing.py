"""The step's token budget as a controller: bounded, monotone, never starving, and settling wherever the machine is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine.pacing import Pacing

SMALLEST, LARGEST = 16, 1024
steps = st.lists(st.tuples(st.integers(2, LARGEST), st.floats(1e-4, 100.0)), max_size=20)


def pacing(target_s: float = 0.25) -> Pacing:
    return Pacing(target_s, smallest=SMALLEST, largest=LARGEST)


@given(steps=steps, decodes=st.integers(1, 2000), target_s=st.floats(0.001, 10.0))
def test_a_budget_is_within_its_bounds_and_prompts_always_proceed(
    steps: list[tuple[int, float]], decodes: int, target_s: float
) -> None:
    paced = pacing(target_s)
    for tokens, seconds in steps:
        paced.observe(tokens, seconds)
    budget = paced.budget(decodes)
    assert min(decodes + SMALLEST, LARGEST) <= budget <= LARGEST
    assert budget >= min(2 * decodes, LARGEST)
    assert budget == paced.budget(decodes)


@given(steps=steps, decodes=st.integers(1, 64), slower=st.floats(1.0, 50.0), later=st.integers(0, 19))
def test_a_step_that_took_longer_never_gives_a_larger_budget(
    steps: list[tuple[int, float]], decodes: int, slower: float, later: int
) -> None:
    usual, other = pacing(), pacing()
    for index, (tokens, seconds) in enumerate(steps):
        usual.observe(tokens, seconds)
        other.observe(tokens, seconds * (slower if index >= later else 1.0))
    assert other.budget(decodes) <= usual.budget(decodes)


@given(
    fixed_s=st.floats(0.0, 0.12),
    token_s=st.floats(0.0003, 0.012),
    factor=st.floats(0.2, 1.0),
    decodes=st.integers(1, 4),
    first=st.integers(SMALLEST, LARGEST),
)
def test_it_settles_at_the_wanted_time_and_again_when_the_machine_changes(
    fixed_s: float, token_s: float, factor: float, decodes: int, first: int
) -> None:
    """On a machine whose steps take a fixed time and one for each token, that gets faster all at once."""
    paced = pacing()
    paced.observe(first, fixed_s + token_s * first)
    for speed in (1.0, factor):
        for _ in range(60):
            tokens = paced.budget(decodes)
            seconds = (fixed_s + token_s * tokens) * speed
            paced.observe(tokens, seconds)
        at_the_end = tokens in (decodes + SMALLEST, LARGEST)
        assert at_the_end or seconds == pytest.approx(0.25, abs=0.01 + 2 * token_s)


def test_decodes_that_take_too_long_by_themselves_leave_prompts_their_smallest_share() -> None:
    paced = pacing()
    for _ in range(50):
        tokens = paced.budget(32)
        paced.observe(tokens, 0.3 + 0.002 * tokens)
    assert paced.budget(32) == 32 + 32


def test_nothing_known_allows_everything() -> None:
    assert pacing().budget(3) == LARGEST


@pytest.mark.parametrize(("target_s", "smallest", "largest"), [(0.0, 16, 64), (-1.0, 16, 64), (0.1, 0, 64), (0.1, 16, 0)])
def test_impossible_settings_are_refused(target_s: float, smallest: int, largest: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        Pacing(target_s, smallest=smallest, largest=largest)
