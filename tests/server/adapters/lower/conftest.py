"""The base that hostile checkpoints are lowered onto."""

from __future__ import annotations

import pytest

from server.adapters.lower.base import Base
from tests.conftest import TinyModels
from tests.harness import load_base_for_lowering


@pytest.fixture(scope="module")
def base(tiny_models: TinyModels) -> Base:
    return load_base_for_lowering(tiny_models("llama"))
