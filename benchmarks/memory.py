"""What the server and its adapters take in memory (``make bench MEMORY=1``).

Resident memory of the server's processes after start, and after 32 adapters have been used; and what a resident adapter takes in the bank beside
the size of its tensors in the base's precision. Writes ``benchmarks/out/memory.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.adapters import RANKS, adapter_sets
from benchmarks.machine import OUT, describe
from benchmarks.method_adapters import METHODS
from benchmarks.over_http import seconds_for_all
from benchmarks.programs import lowered
from benchmarks.soak.memory import process_name
from benchmarks.work import MIXED_RANK
from examples.serving import running_server
from medley_client import Medley
from server.app import pick_dtype
from server.engine.base_dir import BaseDir, prepare_base
from server.engine.engine import Engine
from server.engine.settings import EngineSettings
from server.engine.types import ProgramRef, Request, SamplingParams

GOAL = 1.1
"""What an adapter may take, times its true size."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure memory after start and per adapter.")
    parser.add_argument("--dtype", default="auto", help="precision of the base")
    parser.add_argument("--data-dir", type=Path, default=Path(".medley"))
    arguments = parser.parse_args()
    console = Console()
    dtype = pick_dtype(arguments.dtype)
    base = prepare_base(None, arguments.data_dir, progress=console.print)
    sets = adapter_sets(base, arguments.data_dir)
    chosen = dict(zip((f"LoRA, rank {rank}" for rank in RANKS), sets[MIXED_RANK], strict=False))
    chosen |= {method: sets[method][0] for method in METHODS if method != "LoRA"}
    console.print("lowering adapters, unless they are")
    refs = asyncio.run(lowered(base, dtype, list(chosen.values()), arguments.data_dir / "bench" / "programs"))
    adapters = _in_bank(base, dtype, dict(zip(chosen, refs, strict=True)), arguments.data_dir / "kernels")
    rss = _rss(base, dtype, sets["32"])
    OUT.mkdir(exist_ok=True)
    found = {"machine": describe(dtype), "goal": GOAL, "rss_mib": rss, "adapters": adapters}
    (OUT / "memory.json").write_text(json.dumps(found, indent=2) + "\n")
    table = Table("adapter", "true size, bytes", "in the bank", "times", title="per adapter resident")
    for row in adapters:
        table.add_row(row["adapter"], f"{row['true_bytes']:,}", f"{row['bank_bytes']:,}", f"{row['times']:.3f}")
    console.print(table)
    for when, processes in rss.items():
        console.print(f"{when}: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in processes.items()))
    return 0


def tensor_bytes(file: Path) -> int:
    """What a safetensors file holds, without its header."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")


def _in_bank(base: BaseDir, dtype: str, refs: dict[str, ProgramRef], kernels: Path) -> list[dict[str, Any]]:
    """Admit one after the other, by a request for each."""
    settings = EngineSettings(
        str(base.path),
        base.digest,
        dtype=dtype,
        kv_cache_bytes=64 << 20,
        bank_bytes=1 << 30,
        host_bytes=1 << 30,
        kernel_dir=str(kernels),
    )
    engine = Engine(settings)
    found = []
    try:
        for name, ref in track(refs.items(), description="admitting adapters"):
            before = engine.bank.used_bytes
            engine.add(Request(name, (1, 2, 3), SamplingParams(max_tokens=1, temperature=0), ref))
            while engine.has_unfinished:
                for output in engine.step():
                    if output.error is not None:
                        raise RuntimeError(output.error.message)
            true, taken = tensor_bytes(Path(ref.path)), engine.bank.used_bytes - before
            found.append({"adapter": name, "true_bytes": true, "bank_bytes": taken, "times": round(taken / true, 3)})
    finally:
        engine.close()
    return found


def _rss(base: BaseDir, dtype: str, adapters: list[Path]) -> dict[str, dict[str, float]]:
    """MiB by process, after start and with all adapters resident."""
    flags = ("--model", str(base.path), "--dtype", dtype)
    with tempfile.TemporaryDirectory() as scratch, running_server(Path(scratch), *flags) as url, Medley(url) as client:
        time.sleep(2)  # what the start leaves to do is done
        found = {"after start": _processes()}
        for path in track(adapters, description="pushing adapters"):
            client.adapters.push(path, path.name)
        bodies = [{"model": path.name, "prompt": [1, 2, 3], "max_tokens": 2} for path in adapters]
        seconds_for_all(url, "/v1/completions", bodies)
        found[f"with {len(adapters)} adapters"] = _processes()
    return found


def _processes() -> dict[str, float]:
    taken = {
        name: round(process.memory_info().rss / 2**20, 1)
        for process in psutil.Process().children(recursive=True)
        if (name := process_name(process))
    }
    return {**taken, "together": round(sum(taken.values()), 1)}


if __name__ == "__main__":
    sys.exit(main())
