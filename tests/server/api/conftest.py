"""Tenants of a live server that tests share which need none of their own; each uses names of its own."""

from __future__ import annotations

import pytest

from tests.live import Live, Sharing


@pytest.fixture(scope="session")
def shared(sharing: Sharing) -> Live:
    """On a tiny Llama, with adapters of two tenants."""
    return sharing()
