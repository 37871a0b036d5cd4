"""Engines measured side by side, round by round; what fails is written down and leaves the others alone."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, track

from benchmarks.engines.protocol import Setup
from benchmarks.engines.remote import ROOT, EngineFailed, Remote
from benchmarks.machine import OUT, watched
from benchmarks.results import Goal, Key, Run, judge, rows_of
from benchmarks.work import BASE, WORKLOADS, Job, job

_TIMEOUT_S = 900.0
_WARM_PROMPT, _WARM_TOKENS = 16, 2


@dataclass(frozen=True, slots=True)
class Competitor:
    """One driver. ``name`` is the engine's in results, where several drivers may share it; ``variants`` are by workload. A slow one runs
    ``once``, in the first round; one whose ratios count takes its base ``twice`` a round, first and last."""

    name: str
    module: str
    python: Path
    variants: Mapping[str, Sequence[str]]
    options: Mapping[str, Any] = field(default_factory=dict)
    once: bool = False
    twice: bool = False

    def turns(self) -> list[tuple[str, str]]:
        """(workload, variant) in the order of a round."""
        found = []
        for workload, variants in self.variants.items():
            last = [BASE] if self.twice and BASE in variants else []
            found += [(workload, variant) for variant in [*variants, *last]]
        return found


class Contest:
    """Runs competitors on the same jobs and keeps ``benchmarks/out/NAME.json`` up to date after every run."""

    def __init__(
        self, name: str, setup: Setup, adapters: Mapping[str, Sequence[str]], goals: Sequence[Goal], machine: dict[str, Any]
    ) -> None:
        self._name = name
        self._setup = setup
        self._adapters = adapters
        self._goals = goals
        self._machine = machine
        self._vocab: int = json.loads((Path(setup.base) / "config.json").read_text())["vocab_size"]
        self._started = time.monotonic()
        self._remotes: dict[int, Remote] = {}
        self._console = Console()
        self.runs: dict[Key, list[Run]] = {}
        self.refused: list[dict[str, str]] = []

    def run(self, competitors: Sequence[Competitor], rounds: int, minutes: float) -> None:
        """Measure for at most so many rounds, and start none that would end after ``minutes``; there is always one."""
        try:
            staying = [(number, item) for number, item in enumerate(competitors) if not item.once]
            for number, competitor in track(staying, description="starting and warming up", console=self._console):
                self._start(number, competitor)
            for count in range(rounds):
                present = [(number, item) for number, item in enumerate(competitors) if not (item.once and count)]
                with Progress(console=self._console) as progress:
                    task = progress.add_task(f"round {count + 1}", total=sum(len(item.turns()) for _, item in present))
                    for number, competitor in present:
                        for _ in self._take_turns(number, competitor, count):
                            progress.advance(task)
                if time.monotonic() - self._started + self._seconds_of(staying, count) > 60 * minutes:
                    break
        finally:
            for remote in self._remotes.values():
                remote.close()
        self._machine["load_after"] = round(os.getloadavg()[0], 2)
        self._machine["minutes"] = round((time.monotonic() - self._started) / 60, 1)
        self.write()

    def rows(self) -> list[dict[str, Any]]:
        """Of all runs so far."""
        return rows_of(self.runs)

    def judged(self) -> list[dict[str, Any]]:
        """The goals, on all runs so far."""
        return judge(self._goals, self.rows())

    def write(self) -> None:
        """``NAME.json``: a list with an object a row. ``NAME-notes.json``: the machine, the goals, and what could not be measured."""
        OUT.mkdir(exist_ok=True)
        notes = {"machine": self._machine, "goals": self.judged(), "refused": self.refused}
        (OUT / f"{self._name}.json").write_text(json.dumps(self.rows(), indent=2) + "\n")
        (OUT / f"{self._name}-notes.json").write_text(json.dumps(notes, indent=2) + "\n")

    def _take_turns(self, number: int, competitor: Competitor, count: int) -> Iterator[None]:
        """One competitor's part of a round. One that runs once holds memory during its own part only."""
        if competitor.once:
            self._start(number, competitor)
        for workload, variant in competitor.turns():
            if number in self._remotes:
                self._measure(number, Key(competitor.name, workload, variant), count)
            yield
        if competitor.once and number in self._remotes:
            self._remotes.pop(number).close()

    def _seconds_of(self, staying: Sequence[tuple[int, Competitor]], count: int) -> float:
        """What the runs of a round took of competitors that the next round has, too."""
        names = {item.name for _, item in staying}
        runs = [run for key, runs in self.runs.items() if key.engine in names for run in runs]
        return sum(run.seconds for run in runs if run.round == count)

    def _start(self, number: int, competitor: Competitor) -> None:
        remote = Remote(competitor.module, competitor.python, OUT / "logs" / f"{number}-{competitor.module}.log")
        needed = {path for _, variant in competitor.turns() for path in self._adapters.get(variant, ())}
        setup = replace(self._setup, adapters=sorted(needed), options=dict(competitor.options))
        try:
            remote.start(setup)
            for workload, variant in dict.fromkeys(competitor.turns()):
                remote.run(warming(self._job(workload, variant, seed=10_000)), _TIMEOUT_S)
        except EngineFailed as error:
            remote.close()
            self._refuse(competitor.name, "", str(error))
        else:
            self._remotes[number] = remote

    def _measure(self, number: int, key: Key, count: int) -> None:
        # No prompt comes twice to an engine, also not under another variant that has some of the same adapters: caches must not help.
        occasion = sum(run.round == count for run in self.runs.get(key, ()))
        seed = zlib.crc32(f"{key.workload} {key.variant} {count} {occasion}".encode())
        try:
            with watched() as watch:
                seconds = self._remotes[number].run(self._job(key.workload, key.variant, seed=seed), _TIMEOUT_S)
        except EngineFailed as error:
            self._remotes.pop(number).close()
            self._refuse(key.engine, f"{key.workload} {key.variant}", str(error))
        else:
            self.runs.setdefault(key, []).append(Run(count, seconds, watch.others))
        self.write()

    def _refuse(self, engine: str, work: str, reason: str) -> None:
        # Reasons end up on a page for others: where this checkout lies is not their business.
        reason = reason.replace(f"{ROOT}/", "").replace(str(Path.home()), "~")
        self.refused.append({"engine": engine, "work": work, "reason": reason})
        self._console.print(f"{engine} {work}: {reason}", markup=False)
        self.write()

    def _job(self, workload: str, variant: str, seed: int) -> Job:
        return job(WORKLOADS[workload], variant, self._adapters, vocab_size=self._vocab, seed=seed)


def warming(work: Job) -> Job:
    """A short run that loads the same adapters and meets the same batch size."""
    return replace(work, prompts=[prompt[:_WARM_PROMPT] for prompt in work.prompts], new_tokens=_WARM_TOKENS)
