"""From request to first token when the adapter is on the device, in host memory, or only on disk (``make bench COLD=1``).

SmolLM2, rank 16 on all linears, 64 prompt tokens, one request at a time, through ``EngineClient``: the engine in its own process, without
HTTP and tokenizer, which cost every tier the same. The bank holds one of two adapters. A round takes A from disk (dropped from both tiers
and from the page cache), A again, which is resident then, and B from host memory, where A's admission has sent it. Prompts of a round
differ in length, so that nothing made for one request serves the next. A tier's cost is the median over the rounds of what it takes more
than the resident one beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import mmap
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import OUT
from benchmarks.method_adapters import write_method
from benchmarks.programs import lowered
from benchmarks.work import PROMPT_TOKENS
from server.app import pick_dtype
from server.engine.base_dir import prepare_base
from server.engine.client import EngineClient
from server.engine.settings import EngineSettings
from server.engine.types import BASE, ProgramEvent, ProgramRef, ProgramState, Request, SamplingParams

TIERS = ("base", "resident", "host", "disk")
GOALS_MS = {"host": 10.0, "disk": 30.0}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the first token's time by where the adapter is.")
    parser.add_argument("--rounds", type=int, default=25, help="rounds, each with one request a tier")
    parser.add_argument("--dtype", default="auto", help="precision of the base")
    parser.add_argument("--data-dir", type=Path, default=Path(".medley"))
    arguments = parser.parse_args()
    console = Console()
    dtype = pick_dtype(arguments.dtype)
    base = prepare_base(None, arguments.data_dir, progress=console.print)
    console.print(f"{os.cpu_count()} cores, {dtype}, load average {os.getloadavg()[0]:.1f}")
    # Beside the data, not in a temporary directory, which may be memory.
    with tempfile.TemporaryDirectory(dir=arguments.data_dir) as scratch:
        adapters = write_method("LoRA", base.path, Path(scratch), 2)
        refs = asyncio.run(lowered(base, dtype, adapters, Path(scratch) / "programs"))
        nbytes = Path(refs[0].path).stat().st_size
        settings = EngineSettings(
            model_dir=str(base.path),
            base_digest=base.digest,
            dtype=dtype,
            kv_cache_bytes=64 << 20,
            bank_bytes=nbytes * 3 // 2,
            kernel_dir=str(arguments.data_dir / "kernels"),
        )
        vocab = json.loads((base.path / "config.json").read_text())["vocab_size"]
        measured = asyncio.run(Cold(settings, refs, vocab).run(arguments.rounds))
    rows = [summary(tier, measured) for tier in TIERS]
    dropped = measured["dropped"]
    notes = {"bytes": nbytes, "dtype": dtype, "page_cache_dropped": f"{sum(dropped)} of {len(dropped)}"}
    OUT.mkdir(exist_ok=True)
    (OUT / "cold.json").write_text(json.dumps({**notes, "tiers": rows, "parts": parts(measured)}, indent=2) + "\n")
    console.print(table(rows, notes))
    load, admit = parts(measured).values()
    console.print(f"of a disk-cold request, in the engine: load {load} ms, admission {admit} ms")
    return 0


class Cold:
    """One engine, and the times that its requests took, in seconds by tier."""

    def __init__(self, settings: EngineSettings, refs: list[ProgramRef], vocab: int) -> None:
        self._first, self._second = refs
        self._vocab = vocab
        self._events: list[ProgramEvent] = []
        self._engine = EngineClient(settings, on_event=self._events.append)
        self._asked = 0

    async def run(self, rounds: int) -> dict[str, Any]:
        await self._engine.start()
        measured: dict[str, Any] = {name: [] for name in (*TIERS, "dropped", "load", "admit")}
        try:
            for length in (PROMPT_TOKENS, PROMPT_TOKENS + 1):  # warms up the base, the kernels and the bank's memory
                for ref in (BASE, self._first, self._second):
                    await self._ask(ref, length)
            for number in track(range(rounds), description="rounds"):
                await self._round(PROMPT_TOKENS + 2 * number % 32, measured)
        finally:
            await self._engine.stop()
        return measured

    async def _round(self, length: int, measured: dict[str, Any]) -> None:
        await self._engine.drop_program(self._first.program_id)
        measured["base"].append(await self._ask(BASE, length))
        measured["dropped"].append(drop_from_page_cache(Path(self._first.path)))
        self._events.clear()
        measured["disk"].append(await self._ask(self._first, length))
        self._expect(self._first, ProgramState.LOADING, ProgramState.HOST, ProgramState.RESIDENT)
        seconds = {event.state: event.seconds for event in self._events if event.program_id == self._first.program_id}
        measured["load"].append(seconds[ProgramState.HOST])
        measured["admit"].append(seconds[ProgramState.RESIDENT])
        self._events.clear()
        measured["resident"].append(await self._ask(self._first, length + 1))
        self._expect(self._first)
        measured["host"].append(await self._ask(self._second, length))
        self._expect(self._second, ProgramState.RESIDENT)

    def _expect(self, ref: ProgramRef, *states: ProgramState) -> None:
        """What was measured must be what is said to have been."""
        found = tuple(event.state for event in self._events if event.program_id == ref.program_id)
        if found != states:
            raise RuntimeError(f"the adapter went through {found} and should have through {states}")

    async def _ask(self, ref: ProgramRef, length: int) -> float:
        """Seconds from submission to the first token."""
        self._asked += 1
        rng = random.Random(self._asked)
        prompt = tuple(rng.randrange(100, self._vocab - 100) for _ in range(length))
        await asyncio.sleep(0.02)  # what the request before leaves behind is done
        started = time.perf_counter()
        async for output in self._engine.submit(
            Request(str(self._asked), prompt, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True), ref)
        ):
            if output.error is not None:
                raise RuntimeError(output.error.message)
        return time.perf_counter() - started


def drop_from_page_cache(path: Path) -> bool:
    """Whether the file's next reader waits for the disk: the kernel may refuse, and some file systems are memory."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        with mmap.mmap(file.fileno(), size) as mapped:
            pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            if ctypes.CDLL(None, use_errno=True).mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages):
                return False
    return not any(page & 1 for page in pages)


def summary(tier: str, measured: dict[str, Any]) -> dict[str, Any]:
    """One tier's row, in milliseconds. ``spread``: the quartiles."""
    found = [1000 * seconds for seconds in measured[tier]]
    added = [1000 * (mine - resident) for mine, resident in zip(measured[tier], measured["resident"], strict=True)]
    low, median, high = statistics.quantiles(found, n=4)
    return {
        "tier": tier,
        "first_token_ms": round(median, 1),
        "quartiles_ms": [round(low, 1), round(high, 1)],
        "added_ms": round(statistics.median(added), 1),
        "goal_ms": GOALS_MS.get(tier),
        "rounds": len(found),
    }


def parts(measured: dict[str, Any]) -> dict[str, float]:
    """What the engine itself says a disk-cold request's load and admission took, in milliseconds."""
    return {name: round(1000 * statistics.median(measured[name]), 1) for name in ("load", "admit")}


def table(rows: list[dict[str, Any]], notes: dict[str, Any]) -> Table:
    made = Table(
        "adapter is",
        "first token",
        "quartiles",
        "over resident",
        "goal",
        title=f"{notes['bytes'] / 1e6:.1f} MB programs, {notes['dtype']}; page cache dropped {notes['page_cache_dropped']} times",
    )
    for row in rows:
        low, high = row["quartiles_ms"]
        goal = f"<= {row['goal_ms']:.0f} ms" if row["goal_ms"] else ""
        made.add_row(row["tier"], f"{row['first_token_ms']} ms", f"{low} - {high} ms", f"{row['added_ms']:+} ms", goal)
    return made


if __name__ == "__main__":
    sys.exit(main())
