"""Where the time of a step goes (``make bench STEPS=1``): 1, 8 and 32 rows, without and with adapters, beside the machine's limits.

W1's decode steps (64 prompt tokens, contexts of 65 tokens and more) in process, with clocks around the parts of a step; then the same
requests through a real server: what those take longer is messages, tokenizer and HTTP. Rounds take every case once. Writes
``benchmarks/out/steps.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.adapters import adapter_sets
from benchmarks.engines.medley_http import MedleyHttp
from benchmarks.engines.protocol import Setup
from benchmarks.limits import Limits, measure_limits
from benchmarks.machine import OUT, describe
from benchmarks.programs import lowered
from benchmarks.step_clock import clocked
from benchmarks.step_parts import ATTENTION, EDITS, LINEARS, MESSAGES, PARTS
from benchmarks.work import MIXED_METHOD, Job, prompts
from server.app import pick_dtype
from server.engine.base_dir import BaseDir, prepare_base
from server.engine.engine import Engine
from server.engine.model import DTYPES
from server.engine.settings import EngineSettings
from server.engine.types import BASE, ProgramRef, Request, SamplingParams

ROWS = (1, 8, 32)
PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Case:
    """``rows`` requests at once; request ``i`` uses ``adapters[i % len(adapters)]``, by name; none: all use the base."""

    rows: int
    variant: str
    adapters: tuple[str, ...]

    def names(self) -> list[str]:
        """The adapter of each request, or ``base``."""
        return [self.adapters[index % len(self.adapters)] if self.adapters else "base" for index in range(self.rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure where the time of a decode step goes.")
    parser.add_argument("--rounds", type=int, default=2, help="rounds, each with every case in process and over HTTP")
    parser.add_argument("--new-tokens", type=int, default=24, help="decode steps of a case, about")
    parser.add_argument("--dtype", default="auto", help="precision of the base")
    parser.add_argument("--data-dir", type=Path, default=Path(".medley"))
    parser.add_argument("--in-process", action="store_true", help="leave out the server, and so the messages")
    arguments = parser.parse_args()
    console = Console()
    dtype = pick_dtype(arguments.dtype)
    base = prepare_base(None, arguments.data_dir, progress=console.print)
    sets = adapter_sets(base, arguments.data_dir)
    paths = {path.name: path for name in ("32", MIXED_METHOD) for path in sets[name]}
    machine = describe(dtype)
    cases = [Case(rows, variant, tuple(names)) for rows in ROWS for variant, names in _variants(sets, rows)]
    limits = measure_limits(DTYPES[dtype])
    cache = arguments.data_dir / "bench"
    console.print("lowering adapters, unless they are")
    made = asyncio.run(lowered(base, dtype, list(paths.values()), cache / "programs"))
    refs = dict(zip(paths, made, strict=True))
    steps = _in_process(base, dtype, arguments, cases, refs)
    walls = {} if arguments.in_process else _over_http(base, dtype, arguments, cases, paths, cache)
    rows = [_row(case, steps[case], walls.get(case), base, DTYPES[dtype], limits, refs) for case in cases]
    OUT.mkdir(exist_ok=True)
    found = {"machine": machine, "limits": asdict(limits), "steps": rows}
    (OUT / "steps.json").write_text(json.dumps(found, indent=2) + "\n")
    console.print(_table(rows, limits))
    return 0


def _variants(sets: dict[str, list[Path]], rows: int) -> list[tuple[str, list[str]]]:
    variants = [("base", list[str]()), ("distinct", [path.name for path in sets["32"][:rows]])]
    if rows == max(ROWS):
        variants.append((MIXED_METHOD, [path.name for path in sets[MIXED_METHOD]] + ["base"]))
    return variants


def _in_process(
    base: BaseDir, dtype: str, arguments: argparse.Namespace, cases: list[Case], refs: dict[str, ProgramRef]
) -> dict[Case, dict[str, list[float]]]:
    """Of every case the seconds of its parts in each decode step, and ``wall``: seconds of each run from the first step to the last."""
    engine = Engine(
        EngineSettings(
            model_dir=str(base.path),
            base_digest=base.digest,
            dtype=dtype,
            bank_bytes=2 << 30,
            host_bytes=2 << 30,
            kernel_dir=str(arguments.data_dir / "kernels"),
        )
    )
    vocab = engine.info.vocab_size
    found: dict[Case, dict[str, list[float]]] = {case: defaultdict(list) for case in cases}
    try:
        with clocked(engine) as clock:
            for number in track(range(arguments.rounds + 1), description="in process"):
                for case in cases:
                    tokens = arguments.new_tokens if number else 2  # the first round warms up and loads every program
                    clock.take()
                    started = time.perf_counter()
                    for parts in _steps(engine, clock, case, refs, prompts(vocab, seed=number, requests=case.rows), tokens):
                        if number:
                            for part, seconds in parts.items():
                                found[case][part].append(seconds)
                    if number:
                        found[case]["wall"].append(time.perf_counter() - started)
    finally:
        engine.close()
    return found


def _steps(
    engine: Engine, clock: Any, case: Case, refs: dict[str, ProgramRef], work: list[list[int]], tokens: int
) -> list[dict[str, float]]:
    """Run a case to its end; the parts of the steps in which all its rows decoded."""
    for index, (prompt, name) in enumerate(zip(work, case.names(), strict=True)):
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        engine.add(Request(str(index), tuple(prompt), params, BASE if name == "base" else refs[name]))
    taken, decoded = [], 0
    while engine.has_unfinished:
        clock.take()
        outputs = engine.step()
        for output in outputs:
            if output.error is not None:
                raise RuntimeError(output.error.message)
        parts = clock.take()
        # The step that ends the last prompt is not a decode step; every one after it is, until the rows end together.
        if decoded and len(outputs) == case.rows:
            taken.append({part: parts.get(part, 0.0) for part in PARTS})
        decoded += len(outputs) == case.rows
    return taken


def _over_http(
    base: BaseDir, dtype: str, arguments: argparse.Namespace, cases: list[Case], paths: dict[str, Path], cache: Path
) -> dict[Case, list[float]]:
    """Seconds that every case takes over HTTP, from the first request to the last answer."""
    vocab = json.loads((base.path / "config.json").read_text())["vocab_size"]
    server = MedleyHttp(Setup(str(base.path), base.digest, dtype, [str(path) for path in paths.values()], str(cache)))
    found: dict[Case, list[float]] = defaultdict(list)
    try:
        for number in track(range(arguments.rounds + 1), description="over HTTP"):
            for case in cases:
                tokens = arguments.new_tokens if number else 2
                work = prompts(vocab, seed=100 + number, requests=case.rows)
                seconds = server.run(Job(work, [str(paths[name]) if name in paths else None for name in case.names()], tokens))
                if number:
                    found[case].append(seconds)
    finally:
        server.close()
    return found


def _row(
    case: Case,
    steps: dict[str, list[float]],
    walls: list[float] | None,
    base: BaseDir,
    dtype: torch.dtype,
    limits: Limits,
    refs: dict[str, ProgramRef],
) -> dict[str, Any]:
    """One case: milliseconds by part and the least that the parts' shapes allow."""
    parts = {part: 1000 * statistics.median(steps[part]) for part in PARTS}
    runs = len(steps["wall"])
    per_run = len(steps[LINEARS]) / runs
    if walls is not None:
        parts[MESSAGES] = 1000 * (statistics.median(walls) - statistics.median(steps["wall"])) / (per_run + 2)
    config = json.loads((base.path / "config.json").read_text())
    used = set(case.names()) - {"base"}
    programs = sum(Path(refs[name].path).stat().st_size for name in used)
    kv = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    queries = 2 * config["num_hidden_layers"] * config["num_attention_heads"] * config["head_dim"]
    weights = (base.path / "model.safetensors").stat().st_size / 2  # the checkpoint has two bytes a weight
    context = PROMPT_TOKENS + per_run / 2
    least = {
        # Read once, in the checkpoint's own 16 bits; the embedding is the head's table, so that it counts once.
        LINEARS: limits.seconds(2 * weights, 2 * weights * case.rows),
        ATTENTION: limits.seconds(case.rows * context * kv * dtype.itemsize, 2 * case.rows * context * queries),
        EDITS: limits.seconds(programs, 2 * programs / dtype.itemsize * case.rows / max(1, len(used))),
    }
    return {
        "rows": case.rows,
        "variant": case.variant,
        "parts_ms": {part: round(value, 2) for part, value in parts.items()},
        "step_ms": round(sum(parts[part] for part in PARTS), 2),
        "least_ms": {part: round(1000 * seconds, 2) for part, seconds in least.items()},
        "steps": len(steps[LINEARS]),
    }


def _table(rows: list[dict[str, Any]], limits: Limits) -> Table:
    title = f"a decode step, ms (least possible); reads {limits.read / 1e9:.1f} GB/s, {limits.compute / 1e9:.0f} GFLOP/s"
    names = [*PARTS, MESSAGES]
    made = Table("rows", "adapters", "step", *names, title=title)
    for row in rows:
        cells = []
        for name in names:
            value, least = row["parts_ms"].get(name), row["least_ms"].get(name)
            cells.append("–" if value is None else f"{value:.1f}" + (f" ({least:.1f})" if least else ""))
        made.add_row(str(row["rows"]), row["variant"], f"{row['step_ms']:.1f}", *cells)
    return made


if __name__ == "__main__":
    sys.exit(main())
