"""Tokens per second with 0, 1, 8 and 32 distinct adapters, Medley and PEFT in one run (``make bench``).

W1: 32 requests at once, 64 prompt tokens and 64 new ones each, greedy; adapters of rank 16 on all linears of SmolLM2-135M. Prints
a table and writes ``benchmarks/out/throughput.json``. Machines are noisy: medians of several repeats, with their spread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.method_adapters import write_method
from benchmarks.over_http import tokens_per_second
from benchmarks.work import prompts
from examples.serving import running_server
from medley_client import Medley
from server.app import pick_dtype
from server.engine.base_dir import prepare_base

VARIANTS = (0, 1, 8, 32)
OUT = Path(__file__).parent / "out"


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure Medley and PEFT on the same work.")
    parser.add_argument("--repeats", type=int, default=3, help="repeats of each of Medley's variants")
    parser.add_argument("--peft-repeats", type=int, default=1, help="repeats of each of PEFT's variants, which take minutes")
    parser.add_argument("--dtype", default="auto", help="precision of both engines")
    parser.add_argument("--data-dir", type=Path, default=Path(".medley"))
    arguments = parser.parse_args()
    console = Console()
    dtype = pick_dtype(arguments.dtype)
    base = prepare_base(None, arguments.data_dir, progress=console.print)
    with tempfile.TemporaryDirectory() as scratch:
        console.print(f"{os.cpu_count()} cores, {dtype}, load average {os.getloadavg()[0]:.1f}")
        adapters = write_method("LoRA", base.path, Path(scratch), max(VARIANTS))
        runs = {
            ("medley", name): found
            for name, found in measure_medley(Path(scratch), adapters, base.path, dtype, arguments.repeats).items()
        }
        console.print("peft (a few minutes)")
        runs |= {
            ("peft", name): found for name, found in measure_peft(base.path, Path(scratch), dtype, arguments.peft_repeats).items()
        }
    rows = [summary(engine, variant, found, statistics.median(runs[engine, "base"])) for (engine, variant), found in runs.items()]
    OUT.mkdir(exist_ok=True)
    (OUT / "throughput.json").write_text(json.dumps(rows, indent=2) + "\n")
    console.print(table(rows))
    return 0


def measure_medley(scratch: Path, adapters: list[Path], base: Path, dtype: str, repeats: int) -> dict[str, list[float]]:
    vocab = json.loads((base / "config.json").read_text())["vocab_size"]
    runs: dict[str, list[float]] = {}
    flags = ("--model", str(base), "--dtype", dtype, "--bank-bytes", "2GiB", "--host-bytes", "2GiB")
    with running_server(scratch / "data", *flags) as url, Medley(url) as client:
        names = [path.name for path in adapters]
        for path in track(adapters, description="pushing adapters"):
            client.adapters.push(path, path.name)
        tokens_per_second(url, prompts(vocab, seed=1000), names)  # loads every adapter
        for repeat in track(range(repeats), description="medley"):
            for count in VARIANTS:
                seed = repeat * 10 + count * 1000
                runs.setdefault(str(count) if count else "base", []).append(
                    tokens_per_second(url, prompts(vocab, seed=seed), names[:count])
                )
    return runs


def measure_peft(base: Path, adapters: Path, dtype: str, repeats: int) -> dict[str, list[float]]:
    command = [sys.executable, "-m", "benchmarks.with_peft", str(base), str(adapters), dtype, str(repeats)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, list[float]] = json.loads(finished.stdout.strip().splitlines()[-1])
    return found


def summary(engine: str, variant: str, runs: list[float], base: float) -> dict[str, Any]:
    """One object of throughput.json. ``spread``: (fastest - slowest) / median."""
    median = statistics.median(runs)
    return {
        "engine": engine,
        "workload": "W1",
        "variant": variant,
        "tokens_per_s": round(median, 1),
        "ratio_to_base": round(median / base, 3),
        "spread": round((max(runs) - min(runs)) / median, 3),
        "repeats": len(runs),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    peft = {row["variant"]: row["tokens_per_s"] for row in rows if row["engine"] == "peft"}
    made = Table(
        "engine", "adapters", "tokens/s", "of own base", "spread", "times peft", title="W1: 32 x (64 + 64) tokens, greedy"
    )
    for row in rows:
        times = row["tokens_per_s"] / peft[row["variant"]]
        made.add_row(
            row["engine"],
            row["variant"],
            f"{row['tokens_per_s']:.1f}",
            f"{row['ratio_to_base']:.2f}",
            f"{row['spread']:.0%}",
            f"{times:.1f}x",
        )
    return made


if __name__ == "__main__":
    sys.exit(main())
