"""Checked uploads without the checking, for tests of what comes after: two small files that differ by a number."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

from adapter_store.manifest import manifest_digest
from adapter_store.staging import StagedAdapter, StagedFile

NAMES = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}


def staged(directory: Path, content: int) -> StagedAdapter:
    """An adapter with a config that all have, and weights that only this ``content`` has."""
    files = []
    for role, data in (("config", b"{}"), ("weights", b"%d" % content)):
        sha256 = hashlib.sha256(data).hexdigest()
        path = directory / sha256
        if not path.exists():
            # Other threads may be here too: whoever sees the file sees all of it.
            part = directory / f"{sha256}.{threading.get_ident()}"
            part.write_bytes(data)
            part.replace(path)
        files.append(StagedFile(role, NAMES[role], path, sha256, len(data)))
    return StagedAdapter(manifest_digest({file.role: file.sha256 for file in files}), {}, tuple(files), ())
