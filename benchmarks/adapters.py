"""The adapters of every variant, made once and kept beside the data: all engines get the same files."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.method_adapters import METHODS, slug, write_method
from benchmarks.work import MIXED_METHOD, MIXED_RANK, ZIPF, ZIPF_ADAPTERS
from server.engine.base_dir import BaseDir

RANKS = (4, 8, 16, 32, 64)
DISTINCT = 32
METHOD_COUNT = 8
"""Adapters of each method, for ``make bench METHODS=1``."""


def adapter_sets(base: BaseDir, data_dir: Path) -> dict[str, list[Path]]:
    """Directories of adapters by the variant that uses them, the methods' included; whatever is not there yet is written."""
    recipe = hashlib.sha256(Path(__file__).with_name("method_adapters.py").read_bytes() + Path(__file__).read_bytes())
    directory = data_dir / "bench" / f"adapters-{base.digest[:8]}-{recipe.hexdigest()[:8]}"
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: an interrupted run leaves no half of it.
        with tempfile.TemporaryDirectory(dir=directory.parent) as part:
            _write(base.path, Path(part) / "all")
            os.rename(Path(part) / "all", directory)
    return _sets(directory)


def weight_bytes(adapter: Path) -> int:
    """The size of an adapter's weights file."""
    return sum(path.stat().st_size for path in adapter.glob("*.safetensors"))


def _write(base: Path, directory: Path) -> None:
    write_method("LoRA", base, directory, ZIPF_ADAPTERS)
    for number in range(DISTINCT):
        write_method("LoRA", base, directory, 1, name="ranked", rank=RANKS[number % len(RANKS)], first=number)
    for method in METHODS:
        if method != "LoRA":
            write_method(method, base, directory, METHOD_COUNT)


def _sets(directory: Path) -> dict[str, list[Path]]:
    def numbered(name: str, count: int) -> list[Path]:
        return [directory / f"{name}-{number}" for number in range(count)]

    methods: Mapping[str, list[Path]] = {method: numbered(slug(method), METHOD_COUNT) for method in METHODS}
    return {
        "1": numbered("lora", 1),
        "8": numbered("lora", 8),
        "32": numbered("lora", DISTINCT),
        MIXED_RANK: numbered("ranked", DISTINCT),
        MIXED_METHOD: [paths[0] for paths in methods.values()],
        ZIPF: numbered("lora", ZIPF_ADAPTERS),
        **methods,
    }
