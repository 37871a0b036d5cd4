"""What all cases on a base share: the clean model, the base as the lowering process sees it, and one engine that serves them in turn."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from server.adapters.lower.base import Base
from server.engine.encoder_engine import EncoderEngine
from server.engine.engine import Engine
from server.engine.types import ProgramRef, Request
from tests.harness import Result, load_base_for_lowering, make_encoder, make_engine, run

LABELS = 3
CLASSES = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "FEATURE_EXTRACTION": AutoModel,
}
"""transformers' class for each of PEFT's tasks. A classifier that the base lacks is random."""

_engines: dict[Path, Engine | EncoderEngine] = {}
_served: set[tuple[Path, str]] = set()


def clean_model(base: Path, task: str = "CAUSAL_LM") -> Any:
    """The base in fp32 as transformers loads it, to be wrapped and changed."""
    return copy.deepcopy(unchanged_model(base, task))


@cache
def unchanged_model(base: Path, task: str = "CAUSAL_LM") -> Any:
    """The same, to be read only."""
    labels = {"num_labels": LABELS} if task.endswith("_CLS") else {}
    return CLASSES[task].from_pretrained(base, dtype=torch.float32, **labels).eval()


@cache
def lowering_base(base: Path, dtype: str = "float32") -> Base:
    """The base for lowering."""
    return load_base_for_lowering(base, dtype)


@cache
@torch.inference_mode()
def plain_logits(base: Path, prompt: tuple[int, ...]) -> torch.Tensor:
    """The base's own logits ``(vocab,)`` after a prompt."""
    logits: torch.Tensor = unchanged_model(base)(input_ids=torch.tensor([prompt])).logits
    return logits[0, -1]


def serve(base: Path, program: ProgramRef, requests: Sequence[Request]) -> Mapping[str, Result]:
    """The results of one program's requests, which have the engine to themselves. It knows programs by id, so that none may come twice."""
    assert (base, program.program_id) not in _served
    _served.add((base, program.program_id))
    if base not in _engines:
        _engines[base] = make_encoder(base) if lowering_base(base).spec.is_encoder else make_engine(base)
    results = run(_engines[base], requests)
    _engines[base].drop_program(program.program_id)
    return results


def close_engines() -> None:
    """At the end of all tests."""
    for engine in _engines.values():
        engine.close()
    _engines.clear()
    _served.clear()
