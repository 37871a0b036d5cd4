"""What PEFT must be spared in tests."""

from __future__ import annotations

import pytest
from peft.tuners.boft import layer


@pytest.fixture(autouse=True)
def _no_cuda_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every module that BOFT wraps, PEFT tries again to compile an extension; without it, it does what it does when that fails."""
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: None)
