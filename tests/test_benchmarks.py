"""What benchmarks do with their figures: jobs, medians, goals, the page; and one driver on a tiny model. No timing is asserted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.engines.protocol import Setup
from benchmarks.engines.remote import EngineFailed, Remote
from benchmarks.report import PAGE, PARTS_OF_THE_PAGE, contest, rewritten, table
from benchmarks.results import GOALS, Goal, Key, Run, judge, rows_of
from benchmarks.work import BASE, LONG_PROMPT, MIXED_METHOD, SINGLE, W1, ZIPF, ZIPFIAN, Job, job
from tests.conftest import TinyModels

ADAPTERS = {"8": [f"a{number}" for number in range(8)], MIXED_METHOD: ["x", "y"], ZIPF: [f"z{number}" for number in range(64)]}


def test_every_engine_gets_the_same_job() -> None:
    first = job(W1, "8", ADAPTERS, vocab_size=1000, seed=1)
    assert first == job(W1, "8", ADAPTERS, vocab_size=1000, seed=1)
    assert first.prompts != job(W1, "8", ADAPTERS, vocab_size=1000, seed=2).prompts
    assert (len(first.prompts), len(set(first.adapters)), first.made) == (32, 8, 32 * 64)
    assert set(job(W1, BASE, ADAPTERS, vocab_size=1000, seed=1).adapters) == {None}
    assert set(job(W1, MIXED_METHOD, ADAPTERS, vocab_size=1000, seed=1).adapters) == {"x", "y", None}
    assert len(job(W1, SINGLE, ADAPTERS, vocab_size=1000, seed=1).prompts) == 1
    popular = job(ZIPFIAN, ZIPF, ADAPTERS, vocab_size=1000, seed=1).adapters
    assert 16 < len(set(popular)) < 64


def test_rows_are_medians_and_ratios_are_of_neighbours() -> None:
    base, eight = Key("medley", W1.name, BASE), Key("medley", W1.name, "8")
    # The machine is twice as fast in the second round: paces differ, ratios do not.
    runs = {base: [Run(0, 10, 0.1), Run(0, 10, 0), Run(1, 5, 0), Run(1, 5, 0)], eight: [Run(0, 12.5, 0), Run(1, 6.25, 0)]}
    first, second = rows_of(runs)
    assert second["ratio_to_base"] == 0.8
    assert second["tokens_per_s"] == pytest.approx((2048 / 12.5 + 2048 / 6.25) / 2, abs=0.1)
    assert (first["ratio_to_base"], first["repeats"], first["others"]) == (1.0, 4, 0.1)
    peft = rows_of({Key("peft", W1.name, "32"): [Run(0, 20, 0)], Key("transformers-sdpa", W1.name, BASE): [Run(0, 10, 0)]})
    assert (peft[0]["ratio_to_base"], peft[1]["ratio_to_base"]) == (0.5, 1.0)
    alone = rows_of({Key("vllm", LONG_PROMPT.name, "32"): [Run(0, 16.64, 0)]})
    assert (alone[0]["ratio_to_base"], alone[0]["tokens_per_s"]) == (None, 1000.0)


def row(engine: str, variant: str, pace: float, ratio: float | None = None) -> dict[str, object]:
    return {"engine": engine, "workload": "W1", "variant": variant, "tokens_per_s": pace, "ratio_to_base": ratio}


def test_goals_compare_with_the_best_and_say_what_was_not_measured() -> None:
    goals = [
        Goal("own", "W1", "8", (), 0.85),
        Goal("best", "W1", BASE, ("transformers-sdpa", "transformers-eager"), 2.0),
        Goal("absent", "W1", BASE, ("vllm",), 1.1),
    ]
    rows = [
        row("medley", "8", 90, 0.9),
        row("medley", BASE, 190),
        row("transformers-sdpa", BASE, 90),
        row("transformers-eager", BASE, 100),
    ]
    assert [(item["value"], item["met"]) for item in judge(goals, rows)] == [(0.9, True), (1.9, False), (None, None)]
    assert all(item["met"] is None for item in judge(GOALS, []))


def test_only_what_stands_between_markers_is_rewritten() -> None:
    page = "by hand\n<!-- generated: a -->\nold\n<!-- end -->\nkept\n<!-- generated: b -->\nb\n<!-- end -->\n"
    text = rewritten(page, {"a": r"new \1"})
    assert text == page.replace("old", r"new \1")
    assert rewritten(text, {"a": "old"}) == page
    with pytest.raises(ValueError, match="no markers"):
        rewritten(page, {"c": ""})


def test_the_page_has_a_place_for_every_part() -> None:
    assert rewritten(PAGE.read_text(), dict.fromkeys(PARTS_OF_THE_PAGE, "x")).count("\nx\n<!-- end -->") == len(PARTS_OF_THE_PAGE)


def test_a_part_tells_of_rows_goals_and_refusals() -> None:
    rows = rows_of({Key("medley", W1.name, BASE): [Run(0, 10, 0.25)]})
    notes = {
        "machine": {
            "date": "2026-01-01",
            "commit": "abc",
            "cores": 2,
            "processor": "P",
            "flags": ["avx2"],
            "dtype": "float32",
            "load_before": 1.0,
        },
        "goals": judge(GOALS, rows),
        "refused": [{"engine": "vllm", "work": "", "reason": "needs\nAVX512"}],
    }
    part = contest("make bench")(rows, notes)
    assert "| medley | base | 204.8 | 1.00 | – | 25% |" in part
    assert "not measured" in part
    assert "- vllm: needs AVX512" in part
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n|---|--:|\n| x | 1 |"


def test_a_driver_runs_jobs_and_tells_why_it_cannot(tiny_models: TinyModels, tmp_path: Path) -> None:
    remote = Remote("medley_engine", Path(sys.executable), tmp_path / "log")
    try:
        remote.start(Setup(str(tiny_models("llama")), "0" * 64, "float32", [], str(tmp_path / "cache")))
        assert remote.run(Job([[5, 6, 7], [8, 9]], [None, None], 2), 60) > 0
        with pytest.raises(EngineFailed, match="prompt has no tokens"):
            remote.run(Job([[]], [None], 2), 60)
    finally:
        remote.close()
    with pytest.raises(EngineFailed, match="is not there"):
        Remote("vllm_cpu", tmp_path / "python", tmp_path / "log").start(Setup("", "", "", [], ""))
