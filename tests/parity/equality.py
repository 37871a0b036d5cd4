"""What the engine computes with a program equals what a library computes with the same checkpoint on a clean base, and is not what the base
computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file

from server.engine.types import ProgramRef
from tests.harness import Result, ask, greedy, lower_directory
from tests.parity.cases import Case, make_checkpoint
from tests.parity.shared import clean_model, lowering_base, plain_logits, serve
from tests.parity.variants import INVOCATION
from tests.tiny import ENCODERS

PROMPTS: Mapping[str, Sequence[int]] = {
    "short": [9, 200, 31],
    "invoked": [40, 41, *INVOCATION, 7, 5, 42, 43, *INVOCATION, 44, 45, 46, 47, 48, 49, 50],
    "long": [(7 * index) % 250 + 5 for index in range(70)],
}
SENTENCES: Mapping[str, Sequence[int]] = {
    "short": [1, 9, 200, 31, 2],
    "same length": [1, 7, 8, 9, 2],
    "long": [1, *PROMPTS["long"], 2],
}
"""The same for classifiers: as tokenizers wrap texts."""
TOLERANCE = 1e-4


def check_case(case: Case, family: str, base: Path, directory: Path) -> None:
    """The case's checkpoint, served alone by the engine, equals PEFT on a clean base; on an encoder as a classifier of sentences."""
    if family in ENCODERS:
        check_classifier(case, family, "SEQ_CLS", base, directory)
        return
    adapter = make_checkpoint(case, family, base, directory)
    program = lower_directory(adapter, lowering_base(base), str(directory))
    check_equals_peft(base, adapter, program, case.arguments)


def check_equals_peft(base: Path, adapter: Path, program: ProgramRef, arguments: Mapping[str, Any] | None = None) -> None:
    """The program equals PEFT serving the same checkpoint. ``arguments`` go to PEFT's forward pass."""
    check_equals(base, program, partial(load_reference(base, adapter), **(arguments or {})))


def load_reference(base: Path, adapter: Path, task: str = "CAUSAL_LM") -> Any:
    """The adapter on a clean base, as PEFT serves it."""
    return PeftModel.from_pretrained(clean_model(base, task), adapter).eval()


@torch.inference_mode()
def reference_logits(model: Any, token_ids: Sequence[int], prompt_length: int) -> torch.Tensor:
    """Logits ``(n, vocab)`` at the prompt's last position and all after it, from one full forward pass.

    They are the last ones: virtual tokens have logits too, in front of the real tokens'.
    """
    logits: torch.Tensor = model(
        input_ids=torch.tensor([token_ids]), attention_mask=torch.ones(1, len(token_ids), dtype=torch.long), use_cache=False
    ).logits[0]
    return logits[logits.shape[0] - len(token_ids) + prompt_length - 1 :]


def check_equals(base: Path, program: ProgramRef, reference: Any) -> None:
    """Logits at every generated position and greedy tokens equal the reference model's, and differ from the base's."""
    results = serve(base, program, [greedy(name, prompt, program, tokens=5) for name, prompt in PROMPTS.items()])
    effect = 0.0
    for name, prompt in PROMPTS.items():
        check_result(results[name], reference, prompt, name)
        effect = max(effect, float((plain_logits(base, tuple(prompt)) - results[name].logits[0]).abs().max()))
    assert effect > 1e-2, "the adapter changes nothing, so that this test would prove nothing"


def check_result(result: Result, reference: Any, prompt: Sequence[int], name: str) -> None:
    """One request's logits and tokens against the reference model's."""
    assert result.error is None
    expected = reference_logits(reference, [*prompt, *result.tokens][:-1], len(prompt))
    found = torch.stack(result.logits)
    assert float((found - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max())), name
    assert result.tokens == expected.argmax(-1).tolist(), name


def check_classifier(case: Case, family: str, task: str, base: Path, directory: Path) -> None:
    """The case's checkpoint with a classifier, served alone, equals PEFT on a clean base, and differs from the same classifier on the base."""
    adapter = make_checkpoint(case, family, base, directory, task=task)
    program = lower_directory(adapter, lowering_base(base), str(directory))
    results = serve(base, program, [ask(name, prompt, program) for name, prompt in SENTENCES.items()])
    reference = partial(load_reference(base, adapter, task), **case.arguments)
    for name, prompt in SENTENCES.items():
        expected, found = class_logits(reference, task, prompt), results[name]
        assert found.result is not None, found.error
        assert found.result.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
        assert found.result.per_token == (task == "TOKEN_CLS")
        assert found.rows.shape == expected.shape
        assert float((found.rows - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max())), name
    without = class_logits(classifier_alone(base, adapter, task), task, SENTENCES["short"])
    assert float((results["short"].rows - without).abs().max()) > 1e-2, "only the classifier changes anything"


@torch.inference_mode()
def class_logits(model: Any, task: str, prompt: Sequence[int]) -> torch.Tensor:
    """``(1, labels)`` of a sentence, or ``(n, labels)`` of its tokens. PEFT shows virtual tokens' rows too; they are nobody's tokens."""
    logits: torch.Tensor = model(
        input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long)
    ).logits
    return logits if task == "SEQ_CLS" else logits[0, -len(prompt) :]


def classifier_alone(base: Path, adapter: Path, task: str) -> Any:
    """The base with nothing but the checkpoint's classifier (and pooler, where it has one)."""
    model = clean_model(base, task)
    stored = load_file(adapter / "adapter_model.safetensors").items()
    tensors = {name.removeprefix("base_model.model."): tensor for name, tensor in stored}
    heads = {
        name: tensor for name, tensor in tensors.items() if any(part in name for part in ("classifier.", "score.", "pooler."))
    }
    assert heads
    model.load_state_dict(heads, strict=False)
    return model
