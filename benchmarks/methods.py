"""What each method costs, alone and mixed (``make bench METHODS=1``).

W1 (32 requests x (64 + 64) tokens, greedy) on SmolLM2 over real HTTP: for each method over eight distinct adapters of it, then one batch that
mixes one adapter of every method and base rows. Every round measures everything once, the base first and last, so that a ratio compares
neighbours in time. Adds its rows to ``benchmarks/out/throughput.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.method_adapters import METHODS, write_method
from benchmarks.over_http import tokens_per_second
from benchmarks.throughput import OUT, summary
from benchmarks.work import prompts
from examples.serving import running_server
from medley_client import Medley
from server.app import pick_dtype
from server.engine.base_dir import prepare_base

DISTINCT = 8
MIXED = "mixed-method"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure every method alone and all of them mixed.")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    parser.add_argument("--dtype", default="auto", help="precision")
    parser.add_argument("--data-dir", type=Path, default=Path(".medley"))
    arguments = parser.parse_args()
    console = Console()
    dtype = pick_dtype(arguments.dtype)
    base = prepare_base(None, arguments.data_dir, progress=console.print)
    vocab = json.loads((base.path / "config.json").read_text())["vocab_size"]
    console.print(f"{os.cpu_count()} cores, {dtype}, load average {os.getloadavg()[0]:.1f}")
    runs: dict[str, list[float]] = {}
    flags = ("--model", str(base.path), "--dtype", dtype, "--bank-bytes", "4GiB", "--host-bytes", "4GiB")
    with tempfile.TemporaryDirectory() as scratch, running_server(Path(scratch) / "data", *flags) as url, Medley(url) as client:
        names: dict[str, list[str]] = {"base": []}
        for method in track(METHODS, description="pushing adapters"):
            made = write_method(method, base.path, Path(scratch), DISTINCT)
            names[method] = [client.adapters.push(path, path.name).name for path in made]
        names[MIXED] = [names[method][0] for method in METHODS] + ["base"]
        for variant in names.values():
            tokens_per_second(url, prompts(vocab, seed=1000), variant, new_tokens=2)  # loads every adapter
        for repeat in range(arguments.repeats):
            for number, (variant, adapters) in enumerate(
                track([*names.items(), ("base", [])], description=f"round {repeat + 1} of {arguments.repeats}")
            ):
                found = tokens_per_second(url, prompts(vocab, seed=repeat * 100 + number), adapters)
                runs.setdefault(variant, []).append(found)
    base_pace = statistics.median(runs["base"])
    rows = [summary("medley", variant, found, base_pace) for variant, found in runs.items()]
    OUT.mkdir(exist_ok=True)
    path = OUT / "throughput.json"
    kept = [row for row in (json.loads(path.read_text()) if path.exists() else []) if row["variant"] not in set(runs) - {"base"}]
    path.write_text(json.dumps(kept + [row for row in rows if row["variant"] != "base" or not kept], indent=2) + "\n")
    table = Table(
        "adapters",
        "tokens/s",
        "of base",
        "spread",
        title=f"W1 by method: {DISTINCT} distinct adapters each; {MIXED}: one of each",
    )
    for row in rows:
        table.add_row(row["variant"], f"{row['tokens_per_s']:.1f}", f"{row['ratio_to_base']:.2f}", f"{row['spread']:.0%}")
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
