"""Writes the measured parts of docs/BENCHMARKS.md and its plots from ``benchmarks/out`` (``make bench-report``).

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``; what is written by hand around it stays. A part whose results are not there
stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import plots
from benchmarks.engines.remote import ROOT
from benchmarks.machine import OUT
from benchmarks.step_parts import MESSAGES, PARTS

DOCS = ROOT / "docs"
PAGE = DOCS / "BENCHMARKS.md"
Found = Mapping[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description="Write tables and plots of docs/BENCHMARKS.md from benchmarks/out.")
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    arguments = parser.parse_args()
    parts = {}
    for name, write in PARTS_OF_THE_PAGE.items():
        path = OUT / f"{name}.json"
        if path.exists():
            notes = OUT / f"{name}-notes.json"
            parts[name] = write(json.loads(path.read_text()), json.loads(notes.read_text()) if notes.exists() else {})
            if not arguments.no_plots and name in plots.PLOTS:
                plots.draw(name, json.loads(path.read_text()), DOCS / "images")
    PAGE.write_text(rewritten(PAGE.read_text(), parts))
    sys.stdout.write(f"wrote {', '.join(parts) or 'nothing'}\n")
    return 0


def rewritten(text: str, parts: Mapping[str, str]) -> str:
    """``text`` with these parts between their markers. Raises ValueError for a part that has no place in it."""
    for name, part in parts.items():
        pattern = re.compile(rf"(<!-- generated: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the page has no markers for the part {name!r}")
        text = pattern.sub(lambda match, part=part: f"{match[1]}{part}\n{match[2]}", text)  # type: ignore[misc]
    return text


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns hold words, the others numbers."""
    rule = "|" + "|".join(["---"] * left + ["--:"] * (len(head) - left)) + "|"
    lines = ["| " + " | ".join(row) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], rule, *lines[1:]])


def machine_line(machine: Found, command: str) -> str:
    """Where, when and with what it was measured."""
    flags = " ".join(machine["flags"]) or "no vector extensions"
    line = f"{machine['date']}, {machine['commit']}: {machine['cores']} cores of {machine['processor']} ({flags}), {machine['dtype']}, "
    loads = [
        f"{machine[name]:.1f} {word}" for name, word in (("load_before", "before"), ("load_after", "after")) if name in machine
    ]
    return line + f"load average {' and '.join(loads)}. Command: `{command}`."


def contest(command: str) -> Callable[[Any, Found], str]:
    """A part of rows, goals and refusals, as ``contest`` writes them."""

    def write(rows: Any, notes: Found) -> str:
        pieces = [machine_line(notes["machine"], command)] if notes else []
        for workload in dict.fromkeys(row["workload"] for row in rows):
            pieces.append(f"*{workload}*")
            shown = [_pace(row) for row in rows if row["workload"] == workload]
            pieces.append(table(["engine", "adapters", "tokens/s", "of own base", "spread", "others took"], shown, 2))
        if notes.get("goals"):
            goals = [
                [item["goal"], f"{item['least']:g}", _number(item["value"]), _verdict(item["met"])] for item in notes["goals"]
            ]
            pieces.append(table(["goal", "at least", "measured", "met"], goals))
        refused = [
            f"- {item['engine']} {item['work']}".rstrip() + f": {_one_line(item['reason'])}" for item in notes.get("refused", ())
        ]
        if refused:
            pieces.append("Not measured:\n\n" + "\n".join(refused))
        return "\n\n".join(pieces)

    return write


def steps(found: Found, _: Found) -> str:
    """Where a step's time goes."""
    limits = found["limits"]
    matmuls = ", ".join(f"{rate / 1e9:.0f} at {rows} rows" for rows, rate in limits["matmul"].items())
    intro = (
        f"Milliseconds of a decode step, and in brackets the least that the machine allows: reading {limits['read'] / 1e9:.1f} GB/s, float32 FMAs "
        f"{limits['fma'] / 1e9:.0f} GFLOP/s, PyTorch's linears {matmuls}."
    )
    names = [*PARTS, MESSAGES]
    rows = [
        [str(row["rows"]), row["variant"], f"{row['step_ms']:.1f}", *(_part(row, name) for name in names)]
        for row in found["steps"]
    ]
    return "\n\n".join(
        [machine_line(found["machine"], "make bench STEPS=1"), intro, table(["rows", "adapters", "step", *names], rows, 2)]
    )


def memory(found: Found, _: Found) -> str:
    """Resident memory, and adapters in the bank."""
    processes = list(next(iter(found["rss_mib"].values())))
    rss = [[when, *(f"{taken[name]:.0f}" for name in processes)] for when, taken in found["rss_mib"].items()]
    adapters = [
        [row["adapter"], f"{row['true_bytes']:,}", f"{row['bank_bytes']:,}", f"{row['times']:.3f}"] for row in found["adapters"]
    ]
    worst = max(row["times"] for row in found["adapters"])
    verdict = (
        f"Goal: at most {found['goal']} times the true size; the worst here is {worst:.3f}: {_verdict(worst <= found['goal'])}."
    )
    return "\n\n".join(
        [
            machine_line(found["machine"], "make bench MEMORY=1"),
            table(["resident memory, MiB", *processes], rss),
            table(["adapter", "true size, bytes", "in the bank", "times"], adapters),
            verdict,
        ]
    )


PARTS_OF_THE_PAGE: dict[str, Callable[[Any, Found], str]] = {
    "throughput": contest("make bench"),
    "peers": contest("make bench-peers"),
    "methods": contest("make bench METHODS=1"),
    "steps": steps,
    "memory": memory,
}


def _pace(row: Found) -> list[str]:
    pace, spread, others = f"{row['tokens_per_s']:.1f}", f"{row['spread']:.0%}", f"{row['others']:.0%}"
    return [row["engine"], row["variant"], pace, _number(row["ratio_to_base"]), spread if row["repeats"] > 1 else "–", others]


def _part(row: Found, name: str) -> str:
    value, least = row["parts_ms"].get(name), row["least_ms"].get(name)
    return "–" if value is None else f"{value:.1f}" + (f" ({least:.1f})" if least else "")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _verdict(met: bool | None) -> str:
    return {None: "not measured", True: "yes", False: "**no**"}[met]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]


if __name__ == "__main__":
    sys.exit(main())
