"""Every variant of the LoRA family equals PEFT on every family of bases: logits and greedy tokens, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import TinyModels
from tests.harness import greedy, load_base_for_lowering, lower_directory, make_engine, run
from tests.parity.variants import INVOCATION, VARIANTS, Variant, load_reference, make_adapter, reference_logits
from tests.tiny import FAMILIES

PROMPTS = {
    "short": [9, 200, 31],
    "invoked": [40, 41, *INVOCATION, 7, 5, 42, 43, *INVOCATION, 44, 45, 46, 47, 48, 49, 50],
    "long": [(7 * index) % 250 + 5 for index in range(70)],
}
TOLERANCE = 1e-4

CASES = [
    pytest.param(family, variant, id=f"{family}-{variant.name}")
    for family in FAMILIES
    for variant in VARIANTS
    if variant.families is None or family in variant.families
]


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_logits_and_tokens_equal_peft(family: str, variant: Variant, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models(family)
    adapter = make_adapter(variant, family, base, tmp_path)
    program = lower_directory(adapter, load_base_for_lowering(base), f"{family}-{variant.name}")
    engine = make_engine(base)
    results = run(engine, [greedy(name, prompt, program) for name, prompt in PROMPTS.items()])
    engine.close()
    reference = load_reference(base, adapter)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    effect = 0.0
    for name, prompt in PROMPTS.items():
        result = results[name]
        assert result.error is None
        sequence = [*prompt, *result.tokens]
        expected = reference_logits(reference, sequence[:-1], len(prompt))
        found = torch.stack(result.logits)
        assert float((found - expected).abs().max()) <= TOLERANCE * max(1.0, float(expected.abs().max())), name
        assert result.tokens == expected.argmax(-1).tolist(), name
        effect = max(effect, float((reference_logits(plain, sequence[:-1], len(prompt)) - expected).abs().max()))
    assert effect > 1e-2, "the adapter changes nothing, so that this test would prove nothing"
