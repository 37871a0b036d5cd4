"""How a base directory wants its sentence vectors pooled, as sentence-transformers writes it down. Knows two small JSON files."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

_MODES = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    # Differs from the mean by a factor, which unit length takes away.
    "pooling_mode_mean_sqrt_len_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_NAMES = {"cls": "first", "mean": "mean", "mean_sqrt_len_tokens": "mean", "lasttoken": "last"}
# Unit length is given to every vector, whether Normalize is listed or not.
_MODULES = ("Transformer", "Pooling", "Normalize")

log = logging.getLogger(__name__)


def embedding_pooling(directory: Path, default: str) -> str:
    """``first``, ``last`` or ``mean``: what the directory's modules.json says, else ``default``; "" when that is not served."""
    modules = _read(directory / "modules.json", [])
    kinds = [(str(item.get("type", "")).rpartition(".")[2], item) for item in modules if isinstance(item, dict)]
    if foreign := [kind for kind, _ in kinds if kind not in _MODULES]:
        log.warning("no embeddings: modules.json of the base names %s; served: %s", foreign[0], ", ".join(_MODULES))
        return ""
    found = [item for kind, item in kinds if kind == "Pooling"]
    if not found:
        return default
    config = _read(directory / str(found[0].get("path", "1_Pooling")) / "config.json", {})
    if isinstance(name := config.get("pooling_mode"), str):
        modes = {_NAMES.get(name, "")}
    else:
        modes = {_MODES.get(key, "") for key, value in config.items() if key.startswith("pooling_mode_") and value}
    pooling = next(iter(modes)) if len(modes) == 1 else ""
    if not pooling:
        log.warning("no embeddings: the base's pooling is none of %s", ", ".join(sorted(set(_MODES.values()))))
    return pooling


def _read(path: Path, default: Any) -> Any:
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else default
    return found if isinstance(found, type(default)) else default
