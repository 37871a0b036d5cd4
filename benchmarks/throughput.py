"""Tokens per second of Medley and of others on the same work in one run (``make bench``, ``make bench-peers``).

Prints tables and writes ``benchmarks/out/throughput.json`` (peers: ``peers.json``; methods: ``methods.json``), each with notes on the machine beside
it. Machines are noisy: medians of rounds with their spread, and ratios of neighbours in time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.adapters import adapter_sets, weight_bytes
from benchmarks.competitors import OWN, at_home, with_peers
from benchmarks.contest import Competitor, Contest
from benchmarks.engines.protocol import Setup
from benchmarks.machine import describe
from benchmarks.method_adapters import METHODS
from benchmarks.results import GOALS, PEER_GOALS
from benchmarks.work import BASE, MIXED_METHOD, W1
from server.app import pick_dtype
from server.engine.base_dir import prepare_base
from server.engine.model import DTYPES


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure Medley and others on the same work.")
    parser.add_argument("--peers", action="store_true", help="measure the engines of `make bench-peers` too, and more workloads")
    parser.add_argument("--methods", action="store_true", help="measure Medley alone, method by method, instead")
    parser.add_argument("--only", default="", help="engines to measure, separated by commas (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds at most")
    parser.add_argument(
        "--minutes", type=float, default=0.0, help="start no round that would end later (default: 9, with peers 60)"
    )
    parser.add_argument("--dtype", default="auto", help="precision of all engines")
    parser.add_argument("--data-dir", type=Path, default=Path(".medley"))
    arguments = parser.parse_args()
    console = Console()
    dtype = pick_dtype(arguments.dtype)
    machine = describe(dtype)
    base = prepare_base(None, arguments.data_dir, progress=console.print)
    console.print("writing adapters, unless they are there")
    sets = adapter_sets(base, arguments.data_dir)
    adapters = {name: [str(path.resolve()) for path in paths] for name, paths in sets.items()}
    cache = (arguments.data_dir / "bench").resolve()
    setup = Setup(str(base.path.resolve()), base.digest, dtype, [], str(cache))
    if arguments.methods:
        name, goals = "methods", []
        competitors = [Competitor("medley", "medley_http", OWN, {W1.name: (BASE, *METHODS, MIXED_METHOD)}, twice=True)]
    elif arguments.peers:
        # Adapters are stored in two bytes a weight and resident in the base's precision.
        name, goals = "peers", [*GOALS, *PEER_GOALS]
        competitors = with_peers(weight_bytes(sets["1"][0]) * DTYPES[dtype].itemsize // 2)
    else:
        name, goals, competitors = "throughput", [*GOALS], at_home()
    if arguments.only:
        wanted = arguments.only.split(",")
        if unknown := set(wanted) - {item.name for item in competitors}:
            parser.error(
                f"no such engine: {', '.join(sorted(unknown))}; there are {', '.join(item.name for item in competitors)}"
            )
        competitors = [item for item in competitors if item.name in wanted]
        name += "-part"
    contest = Contest(name, setup, adapters, goals, machine)
    contest.run(competitors, arguments.rounds, arguments.minutes or (60.0 if arguments.peers or arguments.methods else 9.0))
    console.print(
        f"{machine['cores']} cores, {dtype}, load average {machine['load_before']} before, {machine['load_after']} after"
    )
    console.print(rows_table(contest.rows()))
    if goals:
        console.print(goals_table(contest.judged()))
    for item in contest.refused:
        console.print(f"not measured: {item['engine']} {item['work']}: {item['reason']}", markup=False)
    measured = {key.engine for key in contest.runs}
    return 0 if measured and ("medley" in measured or all(item.name != "medley" for item in competitors)) else 1


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """All rows, for the terminal."""
    made = Table("workload", "engine", "adapters", "tokens/s", "of own base", "spread", "others took")
    for row in sorted(rows, key=lambda row: row["workload"]):
        ratio = "–" if row["ratio_to_base"] is None else f"{row['ratio_to_base']:.2f}"
        pace, spread, others = f"{row['tokens_per_s']:.1f}", f"{row['spread']:.0%}", f"{row['others']:.0%}"
        made.add_row(row["workload"], row["engine"], row["variant"], pace, ratio, spread, others)
    return made


def goals_table(judged: Sequence[Mapping[str, Any]]) -> Table:
    """Each goal and whether it is met, for the terminal."""
    made = Table("goal", "at least", "measured", "met")
    for item in judged:
        value = "not measured" if item["value"] is None else f"{item['value']:.2f}"
        made.add_row(item["goal"], f"{item['least']:g}", value, {None: "–", True: "yes", False: "NO"}[item["met"]])
    return made


if __name__ == "__main__":
    sys.exit(main())
