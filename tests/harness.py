"""Driving a synchronous engine in tests: programs from PEFT checkpoints, and every logit that a request saw."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from server.adapters.base_spec import describe
from server.adapters.lower import Checkpoint, lower
from server.adapters.lower.base import Base, BaseWeights
from server.adapters.program_file import write_program
from server.engine.batch import Batch
from server.engine.engine import Engine
from server.engine.runner import StepResult
from server.engine.settings import EngineSettings
from server.engine.types import BASE, FinishReason, ProgramRef, Request, RequestError, SamplingParams

DIGEST = "0" * 64


@dataclass
class Result:
    """What became of a request. ``logits`` has a row ``(vocab,)`` for every sampled position, in order."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: RequestError | None = None
    num_cached_tokens: int = 0


def load_base_for_lowering(directory: Path, dtype: str = "float32") -> Base:
    """The base as the lowering process sees it."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory))
    spec = describe(model, DIGEST, dtype)
    return Base(spec, BaseWeights(directory, spec))


def lower_directory(adapter: Path, base: Base, program_id: str) -> ProgramRef:
    """Lower a PEFT directory and write its program file beside it."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    program = lower(Checkpoint(config, load_file(adapter / "adapter_model.safetensors")), base)
    path = adapter / f"program-{base.spec.dtype}.safetensors"
    write_program(path, program, program_id=program_id, facts={})
    return ProgramRef(program_id, str(path))


def make_engine(directory: Path, dtype: str = "float32", *, kernel: Any = None, **overrides: Any) -> Engine:
    """A small engine on a tiny model."""
    sizes: dict[str, Any] = {
        "kv_cache_bytes": 4 << 20,
        "bank_bytes": 8 << 20,
        "max_batch_tokens": 64,
        "max_running": 32,
        **overrides,
    }
    settings = EngineSettings(model_dir=str(directory), base_digest=DIGEST, dtype=dtype, **sizes)
    return Engine(settings, kernel=kernel)


def greedy(request_id: str, prompt: Sequence[int], program: ProgramRef = BASE, *, tokens: int = 8, **params: Any) -> Request:
    """A greedy request that ignores the end of sequence."""
    tenant = params.pop("tenant", request_id)
    return Request(
        request_id, tuple(prompt), SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, **params), program, tenant
    )


def run(engine: Engine, requests: Iterable[Request], *, max_steps: int = 2000) -> dict[str, Result]:
    """Run requests to their ends, together."""
    results: dict[str, Result] = {}
    for request in requests:
        results[request.request_id] = Result()
        engine.add(request)
    recorded = _Recorder(engine, results)
    for _ in range(max_steps):
        while engine.has_unfinished and not engine.has_runnable and engine.loader.is_waiting:
            time.sleep(0.001)
        for output in engine.step():
            result = results[output.request_id]
            result.tokens += output.token_ids
            result.num_cached_tokens = max(result.num_cached_tokens, output.num_cached_tokens)
            if output.finish_reason is not None:
                assert result.finish_reason is None, "a request ended twice"
                result.finish_reason, result.error = output.finish_reason, output.error
        if not engine.has_unfinished:
            break
    else:
        raise AssertionError(f"requests did not end within {max_steps} steps")
    recorded.detach()
    engine.blocks.check_integrity()
    return results


class _Recorder:
    """Stands between engine and runner and keeps the logits that sampling saw."""

    def __init__(self, engine: Engine, results: dict[str, Result]) -> None:
        self._engine = engine
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
        self._engine._runner = self._runner
