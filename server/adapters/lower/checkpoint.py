"""A checkpoint as it was uploaded: parsed JSON and tensors by role, nothing interpreted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
