"""IA3 equals PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import IA3Config

from tests.conftest import TinyModels
from tests.parity.cases import Case, by_family
from tests.parity.equality import check_case

CASES = (Case("ia3", lambda family: IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2"), kept=("ia3_l",)),)


@pytest.mark.parametrize(("family", "case"), by_family(CASES))
def test_equals_peft(family: str, case: Case, tiny_models: TinyModels, tmp_path: Path) -> None:
    check_case(case, family, tiny_models(family), tmp_path)
