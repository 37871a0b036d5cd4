"""What PEFT must be spared in tests, and the end of the engines that tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from peft import PeftModel
from peft.tuners.boft import layer

from tests.parity.shared import close_engines


@pytest.fixture(scope="session", autouse=True)
def _shared_engines() -> Iterator[None]:
    yield
    close_engines()


@pytest.fixture(autouse=True)
def _no_model_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT fills in a template for a README with every checkpoint, which takes longer than making it."""
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda *_: None)


@pytest.fixture(autouse=True)
def _no_cuda_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """For every module that BOFT wraps, PEFT tries again to compile an extension; without it, it does what it does when that fails."""
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: None)
