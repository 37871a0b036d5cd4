"""Every variant of the LoRA family equals PEFT on every family of bases: logits and greedy tokens, in fp32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import TinyModels
from tests.harness import lower_directory
from tests.parity.equality import check_equals_peft
from tests.parity.shared import lowering_base
from tests.parity.variants import VARIANTS, Variant, make_adapter
from tests.tiny import FAMILIES

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
    check_equals_peft(base, adapter, lower_directory(adapter, lowering_base(base), f"{family}-{variant.name}"))
