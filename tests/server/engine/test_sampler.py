"""Sampling: rows taken together choose what each would alone, and what the row-by-row reference chooses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.engine import sampler
from server.engine.sampler import CANDIDATES, best, sample, sample_reference
from server.engine.sequence import Sequence
from server.engine.types import Request, SamplingParams

EOS = (2, 3)
VOCAB = 1024
"""Several parts, and more than the candidates that are looked at first, so that all ways are taken."""

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.8, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 1, 5, 40, CANDIDATES, CANDIDATES + 1, VOCAB, 5000]),
    top_p=st.sampled_from([1.0, 1.0, 0.01, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.05, 1e-6]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.6, -1.1]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3, -0.7]),
    logit_bias=st.sampled_from([(), (), ((5, 3.5), (7, -100.0)), ((9, 1.25), (9, 2.5))]),
    min_tokens=st.sampled_from([0, 0, 4, 20]),
    stop_token_ids=st.sampled_from([(), (11, 12)]),
    seed=st.integers(0, 1 << 32),
)


def sequence(params: SamplingParams, order: int) -> Sequence:
    """One that has a prompt of ten tokens and made six."""
    generator = torch.Generator().manual_seed(order)
    prompt, made = torch.randint(5, 40, (10,), generator=generator), torch.randint(5, 20, (6,), generator=generator)
    found = Sequence(Request(str(order), tuple(prompt.tolist()), params), order)
    found.token_ids += made.tolist()
    return found


def rows_of(number: int, seed: int, spread: float, *, ties: bool = False) -> Tensor:
    logits = torch.randn(number, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
    return logits.round() if ties else logits


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[list[Any]]:
    """The arguments of each call of one of the sampler's functions."""
    calls: list[Any] = []
    original = getattr(sampler, name)
    with monkeypatch.context() as patch:
        patch.setattr(sampler, name, lambda *arguments: calls.append(arguments) or original(*arguments))
        yield calls


@settings(max_examples=120, deadline=None)
@given(chosen=st.lists(params, min_size=1, max_size=9), seed=st.integers(0, 1 << 20), spread=st.sampled_from([0.1, 1.0, 4.0]))
def test_rows_together_choose_what_the_reference_chooses(chosen: list[SamplingParams], seed: int, spread: float) -> None:
    logits = rows_of(len(chosen), seed, spread)
    before = logits.clone()
    fast = sample(logits, [sequence(item, row) for row, item in enumerate(chosen)], EOS)
    assert torch.equal(logits, before)
    assert fast == sample_reference(logits, [sequence(item, row) for row, item in enumerate(chosen)], EOS)


@settings(max_examples=120, deadline=None)
@given(chosen=st.lists(params, min_size=2, max_size=9), seed=st.integers(0, 1 << 20), ties=st.booleans())
def test_a_row_chooses_the_same_alone_and_beside_others(chosen: list[SamplingParams], seed: int, ties: bool) -> None:
    """Also where logits are equal, as they often are when they were computed in half precision."""
    logits = rows_of(len(chosen), seed, 1.0, ties=ties)
    together = sample(logits, [sequence(item, row) for row, item in enumerate(chosen)], EOS)
    for row, item in enumerate(chosen):
        assert sample(logits[row : row + 1], [sequence(item, row)], EOS) == [together[row]]


@pytest.mark.parametrize(
    ("limits", "spread", "looks"),
    [
        ({"top_p": 0.9}, 4.0, 1),
        ({"top_p": 0.9}, 0.1, 9),  # nearly flat: most of the vocabulary is needed
        ({"top_k": 40, "top_p": 0.9}, 0.1, 1),
        ({"top_k": CANDIDATES}, 0.1, 1),
        ({"top_k": CANDIDATES + 1}, 0.1, 9),
        ({"min_p": 0.05}, 4.0, 1),
        ({"min_p": 0.05}, 0.1, 9),
        ({}, 0.1, 0),
    ],
)
def test_only_rows_that_may_need_more_are_looked_at_twice(
    limits: dict[str, Any], spread: float, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [SamplingParams(temperature=1.0, seed=row, **limits) for row in range(8)]
    with counting(monkeypatch, "_draw_limited") as calls:
        fast = sample(rows_of(8, 0, spread), [sequence(item, row) for row, item in enumerate(wanted)], EOS)
        assert len(calls) == looks
    assert fast == sample_reference(rows_of(8, 0, spread), [sequence(item, row) for row, item in enumerate(wanted)], EOS)


@given(share=st.floats(0.0, 0.9999999), seed=st.integers(0, 1 << 20), spread=st.sampled_from([0.1, 4.0]))
def test_where_a_draw_falls_is_decided_in_double_precision(share: float, seed: int, spread: float) -> None:
    """Also exactly on the borders between tokens, of which half the draws here are."""
    scaled = rows_of(1, seed, spread)
    cumulative = torch.cumsum(torch.softmax(scaled.double(), dim=-1), dim=-1)[0]
    border = float(cumulative[int(share * VOCAB)] / cumulative[-1])
    for draw in (share, min(border, 1 - 1e-9), min(border + 1e-12, 1 - 1e-9), max(border - 1e-12, 0.0)):
        assert sampler._draw(scaled, [draw]) == [sampler._draw_row(scaled[0], SamplingParams(), draw)]


@given(seed=st.integers(0, 1 << 20), ties=st.booleans(), vocab=st.sampled_from([VOCAB, VOCAB - 1]))
def test_the_best_token_is_the_first_of_the_best(seed: int, ties: bool, vocab: int) -> None:
    logits = rows_of(5, seed, 1.0, ties=ties)[:, :vocab]
    assert torch.equal(best(logits), logits.argmax(-1))


def test_each_token_drawn_takes_one_number_and_greedy_ones_none() -> None:
    greedy, drawn = SamplingParams(temperature=0, seed=1), SamplingParams(temperature=1, top_p=0.5, seed=1)
    sequences = [sequence(item, row) for row, item in enumerate((greedy, drawn))]
    expected = sequence(drawn, 9).random
    for _ in range(3):
        sample(rows_of(2, 0, 0.1), sequences, EOS)
        expected.random()
    assert sequences[0].random.getstate() == sequence(greedy, 9).random.getstate()
    assert sequences[1].random.getstate() == expected.getstate()


def test_penalties_are_those_of_their_definitions() -> None:
    wanted = SamplingParams(
        repetition_penalty=1.3,
        presence_penalty=0.6,
        frequency_penalty=-0.3,
        logit_bias=((5, 3.5), (9, 1.25), (9, 2.5)),
        min_tokens=20,
        stop_token_ids=(11,),
    )
    row, found = rows_of(1, 0, 2.0)[0], sequence(wanted, 0)
    expected = row.clone()
    for token in set(found.token_ids):
        expected[token] = expected[token] / 1.3 if expected[token] > 0 else expected[token] * 1.3
    for token in set(found.output_ids):
        expected[token] -= 0.6 - 0.3 * found.output_ids.count(token)
    for token, bias in wanted.logit_bias:
        expected[token] += bias
    expected[[2, 3, 11]] = -math.inf
    sampler._penalise(row, found, EOS)
    assert torch.equal(row, expected)


def test_what_is_drawn_follows_the_distribution() -> None:
    """A chi-squared test on five tokens, of which top-p leaves three; its limit is that of one run in a million."""
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.06, 0.04]]).log()
    found = sequence(SamplingParams(temperature=1.0, top_p=0.85, seed=7), 0)
    counts = torch.zeros(5)
    for _ in range(2000):
        counts[sample(logits, [found], ())[0]] += 1
    expected = torch.tensor([4.0, 3.0, 2.0]) / 9 * 2000
    assert counts[3:].tolist() == [0, 0]
    assert ((counts[:3] - expected) ** 2 / expected).sum() < 27.6


@pytest.mark.parametrize("top_p", [1 - 1e-7, 1 - 1e-8, math.nextafter(1, 0)])
def test_a_top_p_next_to_one_ends(top_p: float) -> None:
    """Shares in fp32 may add up to less than it, however many tokens are looked at."""
    for seed in range(40):
        params = SamplingParams(temperature=1.0, top_p=top_p, min_tokens=20, seed=seed)
        token = sample(rows_of(1, seed, 1.0), [sequence(params, seed)], EOS)[0]
        assert token not in EOS


@pytest.mark.parametrize("temperature", [1e-4, 1e-40, 1e-300])
@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.9}])
def test_the_coldest_draw_is_the_best_token(temperature: float, limits: dict[str, Any]) -> None:
    logits = rows_of(6, 3, 4.0)
    wanted = [SamplingParams(temperature=temperature, seed=row, **limits) for row in range(6)]
    sequences = [sequence(params, row) for row, params in enumerate(wanted)]
    assert sample(logits, sequences, EOS) == logits.argmax(-1).tolist()
