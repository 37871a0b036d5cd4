"""Medley's engine alone, in the driver's process: no HTTP, no messages, no tokenizer."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from benchmarks.engines.protocol import Engine, Setup, drive
from benchmarks.programs import lowered
from benchmarks.work import Job
from server.engine.base_dir import BaseDir
from server.engine.engine import Engine as MedleysEngine
from server.engine.settings import EngineSettings
from server.engine.types import BASE, Request, SamplingParams


class MedleyEngine(Engine):
    """Steps until every request has ended."""

    def __init__(self, setup: Setup) -> None:
        base, cache = BaseDir(Path(setup.base), setup.base_digest, "base", "llama"), Path(setup.cache)
        made = asyncio.run(lowered(base, setup.dtype, [Path(adapter) for adapter in setup.adapters], cache / "programs"))
        self._programs = dict(zip(setup.adapters, made, strict=True))
        self._engine = MedleysEngine(
            EngineSettings(
                model_dir=setup.base,
                base_digest=setup.base_digest,
                dtype=setup.dtype,
                bank_bytes=4 << 30,
                host_bytes=4 << 30,
                kernel_dir=str(cache.parent / "kernels"),
            )
        )

    def run(self, job: Job) -> float:
        started = time.perf_counter()
        for index, (prompt, adapter) in enumerate(zip(job.prompts, job.adapters, strict=True)):
            params = SamplingParams(max_tokens=job.new_tokens, temperature=0, ignore_eos=True)
            program = self._programs[adapter] if adapter else BASE
            self._engine.add(Request(str(index), tuple(prompt), params, program))
        while self._engine.has_unfinished:
            for output in self._engine.step():
                if output.error is not None:
                    raise RuntimeError(output.error.message)
        return time.perf_counter() - started

    def close(self) -> None:
        self._engine.close()


if __name__ == "__main__":
    drive(MedleyEngine)
