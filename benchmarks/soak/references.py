"""What each adapter says alone: run one by one in an engine of their own, before there is a server."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.soak.small_lora import SmallLora, write_files
from benchmarks.soak.streams import Choice
from server.engine.engine import Engine
from server.engine.types import ProgramRef
from server.tokenizer import Tokenizer
from tests.harness import Result, greedy, load_base_for_lowering, lower_directory, make_engine, run

TOLERANCE = 1e-3
"""Largest difference of a token's logarithm of probability, alone and in a batch; float32 on a tiny model differs by about 1e-5."""
_MARGIN = 1e-4
"""Two first choices that are closer than this may change places in a batch, which would say nothing about whose weights were used."""


@dataclass(frozen=True, slots=True)
class Reference:
    """The tokens of one adapter after one prompt."""

    ids: list[int]
    texts: list[str]
    logprobs: list[float]

    def matches(self, choice: Choice) -> bool:
        """Whether a choice has the same tokens, and found them equally likely."""
        return choice.labels in (self.ids, self.texts) and all(
            math.isclose(found, wanted, abs_tol=TOLERANCE) for found, wanted in zip(choice.logprobs, self.logprobs, strict=True)
        )


@dataclass(slots=True)
class Adapters:
    """Adapters with what they say. ``files`` by content number; ``says`` by content and prompt; ``program_bytes``: of the largest."""

    files: dict[int, dict[str, bytes]]
    says: dict[tuple[int, str], Reference]
    program_bytes: int = 0


def make_adapters(model: Path, scratch: Path, numbers: Iterable[int], prompts: Sequence[str], tokens: int) -> Adapters:
    """Adapters of a tiny model, and the solo runs of each. Leaves out those whose choice is nearly a draw somewhere."""
    kind = SmallLora.of(model, rank=8, scale=0.4)
    base = load_base_for_lowering(model)
    tokenizer = Tokenizer(model)
    engine = make_engine(model, prefix_caching=False)
    adapters = Adapters({}, {})
    for number in numbers:
        files = kind.files(number)
        program = lower_directory(write_files(scratch / str(number), files), base, f"{number:064x}")
        results = {prompt: _alone(engine, tokenizer.encode(prompt), program, tokens) for prompt in prompts}
        if min(_margin(result) for result in results.values()) < _MARGIN:
            continue
        adapters.files[number] = files
        for prompt, result in results.items():
            adapters.says[number, prompt] = _reference(result, tokenizer)
        resident = engine.bank.find(program.program_id)
        assert resident is not None, "an adapter that was just used is resident"
        adapters.program_bytes = max(adapters.program_bytes, resident.nbytes)
    engine.close()
    return adapters


def _alone(engine: Engine, prompt: Sequence[int], program: ProgramRef, tokens: int) -> Result:
    return run(engine, [greedy("alone", prompt, program, tokens=tokens)])["alone"]


def _margin(result: Result) -> float:
    best = torch.stack(result.logits).topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


def _reference(result: Result, tokenizer: Tokenizer) -> Reference:
    likely = torch.stack(result.logits).log_softmax(-1).max(-1).values
    return Reference(result.tokens, [tokenizer.token_text(token) for token in result.tokens], likely.tolist())
