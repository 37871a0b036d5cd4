"""A checkpoint as it was uploaded: parsed JSON and tensors by role, nothing interpreted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One adapter directory. ``head`` is a prediction head that is stored beside the adapter, ``children`` are the adapters that a fusion
    refers to by name, in its order, and ``labels`` name the outputs of a classifier where its own files do not."""

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    head: Checkpoint | None = None
    children: Mapping[str, Checkpoint] = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """Who wrote it: ``peft``, ``adapters`` (AdapterHub), ``medley``; "" when nothing says so."""
        if "peft_type" in self.config:
            return "peft"
        if "medley_type" in self.config:
            return "medley"
        is_adapterhub = str(self.config.get("version", "")).startswith("adapters.") or isinstance(self.config.get("config"), dict)
        return "adapters" if is_adapterhub else ""


def read_checkpoint(files: Mapping[str, Path]) -> Checkpoint:
    """A checkpoint from its files by role: ``config`` and ``weights``, and where there are any ``head_config`` and ``head_weights``,
    ``labels``, and for every child of a fusion ``child/<name>/config`` and ``child/<name>/weights``."""
    names = sorted({role.split("/")[1] for role in files if role.startswith("child/")})
    return Checkpoint(
        config=_read_json(files["config"]),
        tensors=load_file(files["weights"]),
        head=Checkpoint(_read_json(files["head_config"]), load_file(files["head_weights"])) if "head_config" in files else None,
        children={
            name: Checkpoint(_read_json(files[f"child/{name}/config"]), load_file(files[f"child/{name}/weights"]))
            for name in names
        },
        labels=tuple(_read_json(files["labels"])) if "labels" in files else (),
    )


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
