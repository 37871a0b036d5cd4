"""Driving a synchronous engine in tests: programs from PEFT checkpoints, and every logit that a request saw."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapter_store.staging import ROLES
from server.adapters.base_spec import describe
from server.adapters.lower import lower
from server.adapters.lower.base import Base, BaseWeights
from server.adapters.lower.checkpoint import read_checkpoint
from server.adapters.program_file import write_program
from server.adapters.skeleton import skeleton
from server.engine.batch import Batch
from server.engine.encoder_engine import EncoderEngine
from server.engine.engine import Engine
from server.engine.runner import StepResult
from server.engine.settings import EngineSettings
from server.engine.types import BASE, FinishReason, ProgramRef, Request, RequestError, SamplingParams, Task, TaskResult

DIGEST = "0" * 64


@dataclass
class Result:
    """What became of a request. ``logits`` has a row ``(vocab,)`` for every sampled position, in order."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: RequestError | None = None
    num_cached_tokens: int = 0
    result: TaskResult | None = None

    @property
    def rows(self) -> Tensor:
        """What a request without tokens gave: ``(n, width)``."""
        assert self.result is not None, self.error
        return torch.tensor(self.result.rows, dtype=torch.float64)


def load_base_for_lowering(directory: Path, dtype: str = "float32") -> Base:
    """The base as the lowering process sees it."""
    spec = describe(skeleton(directory), DIGEST, dtype)
    return Base(spec, BaseWeights(directory, spec))


def lower_directory(adapter: Path, base: Base, program_id: str) -> ProgramRef:
    """Lower an adapter's directory and write its program file beside it."""
    files = {role: adapter / name for name, role in ROLES.items() if (adapter / name).exists()}
    program = lower(read_checkpoint(files), base)
    path = adapter / f"program-{base.spec.dtype}.safetensors"
    write_program(path, program, program_id=program_id, facts={})
    return ProgramRef(program_id, str(path))


def make_encoder(directory: Path, dtype: str = "float32", *, kernel: Any = None, **overrides: Any) -> EncoderEngine:
    """A small engine on a tiny encoder."""
    sizes: dict[str, Any] = {"bank_bytes": 8 << 20, "max_batch_tokens": 4096, "max_running": 256, **overrides}
    return EncoderEngine(EngineSettings(model_dir=str(directory), base_digest=DIGEST, dtype=dtype, **sizes), kernel=kernel)


def ask(request_id: str, prompt: Sequence[int], program: ProgramRef = BASE, *, task: Task = Task.CLASSIFY) -> Request:
    """A request that makes no token."""
    return Request(request_id, tuple(prompt), SamplingParams(), program, request_id, task)


def make_engine(
    directory: Path, dtype: str = "float32", *, kernel: Any = None, clock: Callable[[], float] = time.monotonic, **overrides: Any
) -> Engine:
    """A small engine on a tiny model."""
    sizes: dict[str, Any] = {
        "kv_cache_bytes": 4 << 20,
        "bank_bytes": 8 << 20,
        "max_batch_tokens": 64,
        "max_running": 32,
        **overrides,
    }
    settings = EngineSettings(model_dir=str(directory), base_digest=DIGEST, dtype=dtype, **sizes)
    return Engine(settings, kernel=kernel, clock=clock)


def greedy(request_id: str, prompt: Sequence[int], program: ProgramRef = BASE, *, tokens: int = 8, **params: Any) -> Request:
    """A greedy request that ignores the end of sequence."""
    tenant = params.pop("tenant", request_id)
    return Request(
        request_id, tuple(prompt), SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, **params), program, tenant
    )


def run(engine: Engine | EncoderEngine, requests: Iterable[Request], *, max_steps: int = 2000) -> dict[str, Result]:
    """Run requests to their ends, together."""
    results: dict[str, Result] = {}
    for request in requests:
        results[request.request_id] = Result()
        engine.add(request)
    recorded = _Recorder(engine, results) if isinstance(engine, Engine) else None
    # So that those that wait for a load share steps with the others.
    while engine.loader.is_waiting:
        time.sleep(0.001)
    for _ in range(max_steps):
        while engine.has_unfinished and not engine.has_runnable and engine.loader.is_waiting:
            time.sleep(0.001)
        for output in engine.step():
            result = results[output.request_id]
            result.tokens += output.token_ids
            result.num_cached_tokens = max(result.num_cached_tokens, output.num_cached_tokens)
            if output.finish_reason is not None:
                assert result.finish_reason is None, "a request ended twice"
                result.finish_reason, result.error, result.result = output.finish_reason, output.error, output.result
        if not engine.has_unfinished:
            break
    else:
        raise AssertionError(f"requests did not end within {max_steps} steps")
    if recorded is not None:
        recorded.detach()
        recorded.engine.blocks.check_integrity()
    return results


class _Recorder:
    """Stands between engine and runner and keeps the logits that sampling saw."""

    def __init__(self, engine: Engine, results: dict[str, Result]) -> None:
        self.engine = engine
        self._runner = engine._runner
        self._results = results
        engine._runner = self  # type: ignore[assignment]

    def run(self, batch: Batch) -> StepResult:
        outcome = self._runner.run(batch)
        row = 0
        for item, samples in zip(batch.items, batch.item_samples, strict=True):
            row += samples
            if item.samples:
                self._results[item.sequence.request.request_id].logits.append(outcome.logits[row - 1].clone())
        return outcome

    def detach(self) -> None:
        self.engine._runner = self._runner
