"""Encoders beside the BERT classifiers of sentences that each method's own test has: other families, classifiers of tokens, and vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from server.engine.types import Task
from tests.conftest import TinyModels
from tests.harness import ask, lower_directory
from tests.parity.cases import make_checkpoint, one_case
from tests.parity.equality import SENTENCES, TOLERANCE, check_classifier, load_reference
from tests.parity.shared import lowering_base, serve, unchanged_model

# PEFT warns of its own defaults, and of norms as targets.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

# One of each kind of edit: low rank, dense, Kronecker, rotation, pairs of outputs, norms, biases, scales.
SOME = ("vera-drawn", "fourierft", "lokr-factors", "oft", "road_1", "ln-tuning", "beft", "glora-vector")
SENTENCE_CASES = (*SOME, "prefix-5", "multitask-5", "loha-dense", "dora-pissa")
TOKEN_CASES = ("vera", "lokr", "oft", "ln-tuning", "prefix-5", "p-tuning-mlp", "hira-embedding", "cartridge-17")


@pytest.mark.parametrize(
    ("family", "task", "name"),
    [
        *(("roberta", "SEQ_CLS", name) for name in SENTENCE_CASES),
        *(("bert", "TOKEN_CLS", name) for name in TOKEN_CASES),
        # PEFT does not save the linear before DistilBERT's classifier of sentences, and knows no sizes of it for virtual tokens.
        *(("distilbert", "TOKEN_CLS", name) for name in SOME),
    ],
)
def test_classifiers_equal_peft(family: str, task: str, name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    check_classifier(one_case(name), family, task, tiny_models(family), tmp_path)


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("name", ["trainable-tokens", "miss", "prefix-5"])
def test_vectors_equal_peft(family: str, name: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    """Without a classifier: the mean of the last hidden states, of unit length. PEFT never saves a classifier with trainable tokens."""
    base, case, task = tiny_models(family), one_case(name), "FEATURE_EXTRACTION"
    adapter = make_checkpoint(case, family, base, tmp_path, task=task)
    program = lower_directory(adapter, lowering_base(base), str(tmp_path))
    results = serve(base, program, [ask(key, prompt, program, task=Task.EMBED) for key, prompt in SENTENCES.items()])
    effect = 0.0
    for key, prompt in SENTENCES.items():
        expected = mean_vector(load_reference(base, adapter, task), prompt)
        assert float((results[key].rows - expected).abs().max()) <= TOLERANCE, key
        effect = max(effect, float((mean_vector(unchanged_model(base, task), prompt) - expected).abs().max()))
    assert effect > 1e-2, "the adapter changes nothing"


@torch.inference_mode()
def mean_vector(model: torch.nn.Module, prompt: Sequence[int]) -> torch.Tensor:
    """``(1, hidden)``"""
    ids = torch.tensor([prompt])
    hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
    return torch.nn.functional.normalize(hidden.mean(0, keepdim=True), dim=-1)
