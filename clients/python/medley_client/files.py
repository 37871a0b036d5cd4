"""Which files make an adapter, on the user's disk. Knows nothing of how they are sent."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from medley_client.convert import HEAD_PICKLE, NAMES
from medley_client.errors import MedleyError

Progress = Callable[[str, int, int], None]
"""Called with what is being done (``hashing``, ``sending``, ``receiving``), and how many bytes of how many are through."""

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_SETS = (
    (_CONFIG, _WEIGHTS),
    # AdapterHub's names, and its fusions.
    (_CONFIG, "adapter.safetensors"),
    ("adapter_fusion_config.json", "model_adapter_fusion.safetensors"),
)
_MORE = ("head_config.json", "model_head.safetensors", "labels.json")
_MODEL_CONFIG, _MODEL_WEIGHTS = "config.json", "model.safetensors"
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
_CHUNK = 256 << 10


@dataclass(frozen=True, slots=True)
class File:
    """A file to send under ``name``: one on disk, or bytes made here."""

    name: str
    content: Path | bytes

    @property
    def nbytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def chunks(self, start: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The bytes from ``start`` to before ``end``."""
        with self._open() as handle:
            handle.seek(start)
            left = (self.nbytes if end is None else end) - start
            while left > 0 and (chunk := handle.read(min(_CHUNK, left))):
                yield chunk
                left -= len(chunk)

    def digest(self, report: Callable[[int], None]) -> str:
        """``sha256:…`` of the bytes. ``report`` is called with how many are through."""
        found, through = hashlib.sha256(), 0
        for chunk in self.chunks():
            found.update(chunk)
            through += len(chunk)
            report(through)
        return f"sha256:{found.hexdigest()}"

    def _open(self) -> BinaryIO:
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")


def find_files(source: Path, *, rank: int | None = None, exact: bool = False) -> list[File]:
    """What to send of a directory, or the archive itself. Raises MedleyError with what is missing.

    A fine-tuned model (``config.json``, ``model.safetensors``, no adapter) is sent with a config that says what becomes of it: compressed
    to ``rank``, or every difference to the base ``exact`` as it is.
    """
    is_model = (source / _MODEL_CONFIG).is_file() and not (source / _CONFIG).exists()
    if is_model:
        return _find_model(source, rank, exact)
    if rank is not None or exact:
        raise MedleyError(f"--rank and --exact are for fine-tuned models (a directory with {_MODEL_CONFIG}); {source} is none")
    if source.is_file():
        if not source.name.endswith(ARCHIVES):
            raise MedleyError(f"{source} is not an adapter directory, and no {', '.join(ARCHIVES)} either")
        return [File(source.name, source)]
    if not source.is_dir():
        raise MedleyError(f"{source} does not exist")
    complete = [names for names in _SETS if all((source / name).is_file() for name in names)]
    pickles = [name for name, converted in NAMES.items() if (source / name).is_file() and not (source / converted).is_file()]
    if not complete:
        missing = [name for name in _SETS[0] if not (source / name).is_file()]
        hint = f"; turn its {pickles[0]} into safetensors first: medley convert {source}" if pickles else ""
        raise MedleyError(f"{source} has no {' and no '.join(missing)}{hint}")
    names = [name for name in (*complete[0], *_MORE) if (source / name).is_file()]
    if "head_config.json" in names and HEAD_PICKLE in pickles:
        raise MedleyError(f"{source} has its head in {HEAD_PICKLE} only; turn it into safetensors first: medley convert {source}")
    return [File(name, source / name) for name in names]


def _find_model(source: Path, rank: int | None, exact: bool) -> list[File]:
    if not (source / _MODEL_WEIGHTS).is_file():
        shards = (source / f"{_MODEL_WEIGHTS}.index.json").is_file()
        hint = (
            "; its weights are in several files: save them in one with save_pretrained(…, max_shard_size='100GB')"
            if shards
            else ""
        )
        raise MedleyError(f"{source} is a model without {_MODEL_WEIGHTS}{hint}")
    if exact == (rank is not None):
        raise MedleyError(
            f"{source} is a whole model, not an adapter: push it with --rank N (its difference to the base as rank N, small, with the error "
            "reported), or with --exact (every difference as it is, large)"
        )
    config = {"medley_type": "FINE_TUNE", "rank": rank}
    return [File(_CONFIG, json.dumps(config).encode()), File(_WEIGHTS, source / _MODEL_WEIGHTS)]
