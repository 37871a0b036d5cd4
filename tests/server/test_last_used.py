"""When adapters were used last, before it is written down."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from adapter_store.store import Store
from adapter_store.types import AdapterVersion
from server.last_used import LastUsed


def test_a_new_version_was_never_used_whatever_had_its_number_before(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    last_used = LastUsed(store)
    before = time.time()
    version = AdapterVersion("acme", "bot", 1, "sha256:0", before - 10, 1, ())
    assert last_used.of(version) is None
    last_used.note([version])
    noted = last_used.of(version)
    assert noted is not None
    assert noted >= before
    assert last_used.of(replace(version, created=time.time() + 1)) is None
    store.close()
