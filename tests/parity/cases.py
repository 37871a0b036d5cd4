"""Checkpoints of any method as PEFT makes them, with every trained tensor random, and the comparison with PEFT itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from server.engine.types import ProgramRef
from tests.harness import Result, greedy, load_base_for_lowering, lower_directory, make_engine, run
from tests.parity.variants import INVOCATION, load_reference, reference_logits

FAMILIES = ("llama", "gpt2", "qwen2")
PROMPTS: Mapping[str, Sequence[int]] = {
    "short": [9, 200, 31],
    "invoked": [40, 41, *INVOCATION, 7, 5, 42, 43, *INVOCATION, 44, 45, 46, 47, 48, 49, 50],
    "long": [(7 * index) % 250 + 5 for index in range(70)],
}
TOLERANCE = 1e-4
LINEARS = {"gpt2": ["c_attn", "c_proj", "c_fc"]}
DEFAULT_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def linears(family: str) -> list[str]:
    """The last parts of the names of all linears of a layer."""
    return LINEARS.get(family, DEFAULT_LINEARS)


@dataclass(frozen=True)
class Case:
    """A PEFT configuration for a family. ``trained`` are parts of parameter names that are random although PEFT does not train them;
    ``kept`` are those that get noise on top of what they are (scales and norms, around which zero would mean nothing). ``arguments`` are
    what PEFT's forward must be told beside tokens."""

    name: str
    config: Callable[[str], Any]
    families: tuple[str, ...] = FAMILIES
    trained: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    scale: float = 0.15
    arguments: Mapping[str, Any] = field(default_factory=dict)


def make_checkpoint(case: Case, family: str, base: Path, directory: Path, *, seed: int = 9) -> Path:
    """Create, randomise and save an adapter with PEFT."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), case.config(family))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or any(part in name for part in case.trained):
            noise = torch.randn(parameter.shape, generator=generator) * case.scale
            parameter.data = parameter.data + noise if any(part in name for part in case.kept) else noise
    model.save_pretrained(directory)
    return directory


def check_case(case: Case, family: str, base: Path, directory: Path) -> None:
    """The case's checkpoint, served alone by the engine, equals PEFT on a clean base."""
    adapter = make_checkpoint(case, family, base, directory)
    program = lower_directory(adapter, load_base_for_lowering(base), f"{family}-{case.name}")
    check_equals_peft(base, adapter, program, case.arguments)


def check_equals_peft(base: Path, adapter: Path, program: ProgramRef, arguments: Mapping[str, Any] | None = None) -> None:
    """The program equals PEFT serving the same checkpoint. ``arguments`` go to PEFT's forward pass."""
    check_equals(base, program, partial(load_reference(base, adapter), **(arguments or {})))


def check_equals(base: Path, program: ProgramRef, reference: Any) -> None:
    """Logits at every generated position and greedy tokens equal the reference model's, and differ from the base's."""
    engine = make_engine(base)
    results = run(engine, [greedy(name, prompt, program) for name, prompt in PROMPTS.items()])
    engine.close()
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    effect = 0.0
    for name, prompt in PROMPTS.items():
        check_result(results[name], reference, prompt, name)
        sequence = [*prompt, *results[name].tokens][:-1]
        effect = max(
            effect,
            float((reference_logits(plain, sequence, len(prompt)) - torch.stack(results[name].logits)).abs().max()),
        )
    assert effect > 1e-2, "the adapter changes nothing, so that this test would prove nothing"


def check_result(result: Result, reference: Any, prompt: Sequence[int], name: str) -> None:
    """One request's logits and tokens against the reference model's."""
    assert result.error is None
    expected = reference_logits(reference, [*prompt, *result.tokens][:-1], len(prompt))
    found = torch.stack(result.logits)
    assert float((found - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max())), name
    assert result.tokens == expected.argmax(-1).tolist(), name
