"""``make soak``: both soaks, for real. Prints tables, writes ``benchmarks/out/soak.json``, and fails when a promise is broken.

Promises are exactness, the absence of hangs, and memory that is freed; times and rates are figures, not promises.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.soak.churn import PROMPTS, TOKENS, Churn, ChurnReport
from benchmarks.soak.references import make_adapters
from benchmarks.soak.report import churn_table, failures, zipf_tables
from benchmarks.soak.zipf import Plan, run_zipf
from server.app import pick_dtype
from server.engine.base_dir import prepare_base
from tests.live import live_server
from tests.tiny import make_tiny

OUT = Path(__file__).parents[1] / "out"
_SLOTS = 3


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description="Change adapters under load and check every token; then serve thousands of adapters with Zipf's popularity.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", choices=("churn", "zipf"), help="run one of the two")
    parser.add_argument("--churn-seconds", type=float, default=60, help="how long adapters are changed")
    parser.add_argument("--changes", type=float, default=30, help="changes a second")
    parser.add_argument("--versions", type=int, default=200, help="different adapters that are pushed during the churn")
    parser.add_argument("--adapters", type=int, default=10_000, help="registered adapters")
    parser.add_argument("--device", type=int, default=32, help="the device's budget, in adapters")
    parser.add_argument("--host", type=int, default=256, help="the host's budget, in adapters")
    parser.add_argument("--rank", type=int, default=2, help="rank of the registered adapters, on q and v of every layer")
    parser.add_argument("--block-seconds", type=float, default=25, help="length of a block of arrivals")
    parser.add_argument("--rounds", type=int, default=2, help="blocks of each kind, without loads and with them")
    parser.add_argument("--probes", type=int, default=40, help="probes of each tier")
    parser.add_argument("--load", type=float, default=0.6, help="arrivals, as a part of what the base alone serves")
    parser.add_argument("--threads", type=int, default=1, help="threads of the engine")
    parser.add_argument("--dtype", default="auto", help="precision of the real base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=Path(".medley"), help="where the converted base is kept")
    arguments = parser.parse_args()
    console = Console()
    console.print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    result: dict[str, Any] = {"cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1)}
    kept = True
    with tempfile.TemporaryDirectory(prefix="medley-soak-") as scratch:
        if arguments.only != "zipf":
            churn = run_churn(arguments, Path(scratch) / "churn")
            console.print(churn_table(churn))
            result["churn"] = churn.to_json()
            kept = not (churn.mismatches or churn.hangs or churn.errors) and churn.freed_after_s is not None
        if arguments.only != "churn":
            base = prepare_base(None, arguments.data_dir, progress=console.print)
            zipf = run_zipf(plan_of(arguments), base, Path(scratch) / "zipf")
            for table in zipf_tables(zipf):
                console.print(table)
            console.print(failures(zipf), markup=False)
            result["zipf"] = zipf.to_json()
            kept &= not zipf.failures
    OUT.mkdir(exist_ok=True)
    (OUT / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
    return 0 if kept else 1


def run_churn(arguments: argparse.Namespace, scratch: Path) -> ChurnReport:
    torch.set_num_threads(1)
    model = make_tiny("llama", scratch / "model")
    numbers = track(range(arguments.versions), description="running every version alone")
    adapters = make_adapters(model, scratch / "adapters", numbers, PROMPTS, TOKENS)
    room = adapters.program_bytes * _SLOTS + adapters.program_bytes // 2
    with live_server(model, scratch / "data", "--bank-bytes", str(room), "--host-bytes", str(2 * room)) as live:
        seconds = arguments.churn_seconds
        churn = Churn(live.url, live.keys, adapters, seconds=seconds, changes_per_s=arguments.changes, seed=arguments.seed)
        return asyncio.run(churn.run())


def plan_of(arguments: argparse.Namespace) -> Plan:
    return Plan(
        adapters=arguments.adapters,
        device=arguments.device,
        host=arguments.host,
        rank=arguments.rank,
        seconds=arguments.block_seconds,
        rounds=arguments.rounds,
        probes=arguments.probes,
        load=arguments.load,
        threads=arguments.threads,
        dtype=pick_dtype(arguments.dtype),
        seed=arguments.seed,
    )


if __name__ == "__main__":
    sys.exit(main())
