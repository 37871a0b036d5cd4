"""Checkpoints of any method as PEFT makes them, with every trained tensor random. A case fits decoders, where it is a language model, and
encoders, where it is a classifier."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

import tests.parity
from tests.parity.shared import clean_model

FAMILIES = ("llama", "gpt2", "qwen2")
EVERYWHERE = (*FAMILIES, "bert")
PLAIN_LINEARS = ("llama", "qwen2", "bert")
"""Families without GPT-2's Conv1D, for which PEFT has no layers of many methods; of some of them it has layers for GPT-2's head."""
ONE_IS_ENOUGH = ("llama",)
"""For variants of a method that other cases show to fit every family."""
DEFAULT_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Not "dense", which would take in BERT's pooler, no part of the backbone.
_BERT = ["query", "key", "value", "intermediate.dense", "output.dense"]
_LINEARS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
}
_TWO_LINEARS = {
    "gpt2": ["c_attn", "c_fc"],
    "bert": ["query", "output.dense"],
    "roberta": ["query", "output.dense"],
    "distilbert": ["q_lin", "lin2"],
}
_EMBEDDINGS = {"gpt2": "wte", "bert": "word_embeddings", "roberta": "word_embeddings", "distilbert": "word_embeddings"}
_NORMS = {
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "bert": ["output.LayerNorm", "embeddings.LayerNorm"],
    "roberta": ["output.LayerNorm", "embeddings.LayerNorm"],
    "distilbert": ["sa_layer_norm", "output_layer_norm"],
}


def linears(family: str) -> list[str]:
    """The last parts of the names of all linears of a layer."""
    return _LINEARS.get(family, DEFAULT_LINEARS)


def two_linears(family: str) -> list[str]:
    """Two of them, of different shapes."""
    return _TWO_LINEARS.get(family, ["q_proj", "down_proj"])


def embedding(family: str) -> str:
    """The same for the embedding of tokens."""
    return _EMBEDDINGS.get(family, "embed_tokens")


def norms(family: str) -> list[str]:
    """The same for norms."""
    return _NORMS.get(family, ["input_layernorm", "post_attention_layernorm", "norm"])


@dataclass(frozen=True)
class Case:
    """A PEFT configuration for a family. ``trained`` are parts of parameter names that are random although PEFT does not train them;
    ``kept`` are those that get noise on top of what they are (scales and norms, around which zero would mean nothing). ``arguments`` are
    what PEFT's forward must be told beside tokens."""

    name: str
    config: Callable[[str], Any]
    families: tuple[str, ...] = EVERYWHERE
    trained: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    scale: float = 0.15
    arguments: Mapping[str, Any] = field(default_factory=dict)


def by_family(cases: Iterable[Case]) -> list[Any]:
    """A parameter ``(family, case)`` for every family of every case."""
    return [pytest.param(family, case, id=f"{family}-{case.name}") for case in cases for family in case.families]


def all_cases(family: str | None = None) -> Iterator[Case]:
    """Every case, or every one for a family, in ``CASES`` of the tests in this folder."""
    for info in pkgutil.iter_modules(tests.parity.__path__):
        if info.name.startswith("test_"):
            for case in getattr(importlib.import_module(f"tests.parity.{info.name}"), "CASES", ()):
                if isinstance(case, Case) and (family is None or family in case.families):
                    yield case


def one_of_each(family: str) -> Iterator[Case]:
    """The first case of every peft_type."""
    seen = set()
    for case in all_cases(family):
        kind = case.config(family).peft_type
        if kind not in seen:
            seen.add(kind)
            yield case


def one_case(name: str) -> Case:
    """A case by its name."""
    return next(case for case in all_cases() if case.name == name)


def make_checkpoint(case: Case, family: str, base: Path, directory: Path, *, task: str = "CAUSAL_LM", seed: int = 9) -> Path:
    """Create, randomise and save an adapter with PEFT, for classifiers with a classifier."""
    torch.manual_seed(seed)
    config = case.config(family)
    kept = case.kept
    if task != "CAUSAL_LM":
        config.task_type, kept = task, (*kept, "modules_to_save")
    model = get_peft_model(clean_model(base, task), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or any(part in name for part in case.trained):
            noise = torch.randn(parameter.shape, generator=generator) * case.scale
            parameter.data = parameter.data + noise if any(part in name for part in kept) else noise
    model.save_pretrained(directory)
    return directory
