"""What runs come to: rows of throughput.json, and goals met or not. Pure: numbers in, plain data out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.work import BASE, LONG_PROMPT, MIXED_METHOD, SINGLE, W1, WORKLOADS

BASE_OF = {"peft": "transformers-sdpa"}
"""Engines whose base is another one's: PEFT's model without adapters is transformers'."""
TRANSFORMERS = ("transformers-sdpa", "transformers-eager")
VLLM = ("vllm",)
PEERS = ("vllm", "llama.cpp", "openvino", "peft")


@dataclass(frozen=True, slots=True)
class Key:
    """What was measured."""

    engine: str
    workload: str
    variant: str


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement: in which round, how long it took, and what part of the machine others took meanwhile."""

    round: int
    seconds: float
    others: float


def tokens_of(key: Key) -> int:
    """Tokens that a run's pace counts: new ones, and on long prompts the prompts' too, which are the work there."""
    workload = WORKLOADS[key.workload]
    requests = 1 if key.variant == SINGLE else workload.requests
    counted = workload.new_tokens + (workload.prompt_tokens if workload is LONG_PROMPT else 0)
    return requests * counted


def rows_of(runs: Mapping[Key, Sequence[Run]]) -> list[dict[str, Any]]:
    """One object for each key: medians, with ``spread`` as (fastest - slowest) / median. ``ratio_to_base`` is the median of the rounds' ratios."""
    return [_row(key, found, runs) for key, found in runs.items() if found]


def _row(key: Key, found: Sequence[Run], runs: Mapping[Key, Sequence[Run]]) -> dict[str, Any]:
    paces = [tokens_of(key) / run.seconds for run in found]
    median = statistics.median(paces)
    return {
        "engine": key.engine,
        "workload": key.workload,
        "variant": key.variant,
        "tokens_per_s": round(median, 1),
        "ratio_to_base": _ratio(key, runs),
        "spread": round((max(paces) - min(paces)) / median, 3),
        "repeats": len(paces),
        "seconds": round(statistics.median(run.seconds for run in found), 2),
        "others": round(max(run.others for run in found), 3),
    }


def _ratio(key: Key, runs: Mapping[Key, Sequence[Run]]) -> float | None:
    """Against the base of the same round, which is near in time; None where no base was measured."""
    base = Key(BASE_OF.get(key.engine, key.engine), key.workload, BASE)
    mine, its = _by_round(key, runs), _by_round(base, runs)
    ratios = [pace / its[number] for number, pace in mine.items() if number in its]
    return round(statistics.median(ratios), 3) if ratios else None


def _by_round(key: Key, runs: Mapping[Key, Sequence[Run]]) -> dict[int, float]:
    """Mean pace in each round: a base is measured first and last in it."""
    rounds: dict[int, list[float]] = {}
    for run in runs.get(key, ()):
        rounds.setdefault(run.round, []).append(tokens_of(key) / run.seconds)
    return {number: statistics.mean(paces) for number, paces in rounds.items()}


@dataclass(frozen=True, slots=True)
class Goal:
    """Medley's variant over another engine's best (``engines`` empty: over its own base), at least so many times."""

    text: str
    workload: str
    variant: str
    engines: tuple[str, ...]
    least: float


GOALS = (
    Goal("8 distinct adapters, of own base", W1.name, "8", (), 0.85),
    Goal("32 distinct adapters, of own base", W1.name, "32", (), 0.7),
    Goal("mixed methods, of own base", W1.name, MIXED_METHOD, (), 0.7),
    Goal("base, times transformers' best", W1.name, BASE, TRANSFORMERS, 2.0),
    Goal("32 distinct adapters, times PEFT's", W1.name, "32", ("peft",), 12.0),
    Goal("single stream, times transformers' best", W1.name, SINGLE, TRANSFORMERS, 2.0),
)
PEER_GOALS = (
    Goal("base, times vLLM's", W1.name, BASE, VLLM, 1.1),
    Goal("8 distinct adapters, times the best peer's", W1.name, "8", PEERS, 3.5),
    Goal("32 distinct adapters, times the best peer's", W1.name, "32", PEERS, 3.0),
    Goal("long prompts with 32 adapters, times vLLM's", LONG_PROMPT.name, "32", VLLM, 4.0),
)


def judge(goals: Sequence[Goal], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with its ``value`` and whether it is ``met``; None where what it compares was not measured."""
    found = {Key(row["engine"], row["workload"], row["variant"]): row for row in rows}
    return [
        {"goal": goal.text, "least": goal.least, "value": value, "met": None if value is None else value >= goal.least}
        for goal in goals
        for value in [_value(goal, found)]
    ]


def _value(goal: Goal, found: Mapping[Key, Mapping[str, Any]]) -> float | None:
    mine = found.get(Key("medley", goal.workload, goal.variant))
    if mine is None:
        return None
    if not goal.engines:
        return mine["ratio_to_base"]  # type: ignore[no-any-return]
    keys = {engine: Key(engine, goal.workload, goal.variant) for engine in goal.engines}
    theirs: dict[str, float] = {engine: found[key]["tokens_per_s"] for engine, key in keys.items() if key in found}
    # Peft runs everywhere: alone it does not stand for the peers.
    if not theirs or (set(theirs) == {"peft"} and len(keys) > 1):
        return None
    ours: float = mine["tokens_per_s"]
    return round(ours / max(theirs.values()), 2)
