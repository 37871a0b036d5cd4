"""A server that tests share which need no settings of their own; each uses names of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import TinyModels
from tests.live import Live, live_server


@pytest.fixture(scope="session")
def shared(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """On a tiny Llama, with adapters of two tenants."""
    with live_server(tiny_models("llama"), tmp_path_factory.mktemp("shared")) as server:
        yield server
