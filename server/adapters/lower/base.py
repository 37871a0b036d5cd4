"""The base model as lowering reads it: its sites, and single weights on demand. Knows safetensors files, no adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from server.adapters.base_spec import BaseSpec, SiteSpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class BaseWeights:
    """Weights of a base directory, memory-mapped: only what a lowering asks for is read."""

    def __init__(self, directory: Path, spec: BaseSpec) -> None:
        self._spec = spec
        self._files: dict[str, Any] = {}
        index = directory / "model.safetensors.index.json"
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
        for name in sorted(names):
            file = safe_open(directory / name, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]

    def get(self, name: str) -> Tensor | None:
        """A tensor by its parameter name, with or without the backbone's prefix, as stored; None when there is none."""
        prefix = self._spec.backbone_prefix
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in self._files:
                tensor: Tensor = self._files[candidate].get_tensor(candidate)
                return tensor
        return None


class Base:
    """Sites and weights. All weights come in the accumulation dtype: fp32, or fp64 on an fp64 base."""

    def __init__(self, spec: BaseSpec, weights: BaseWeights) -> None:
        self.spec = spec
        self.dtype = _DTYPES[spec.dtype]
        self.compute = torch.promote_types(self.dtype, torch.float32)
        self._weights = weights
        self._sites = spec.by_name()

    def weight(self, site: str) -> Tensor:
        """``(out, in)`` of a linear or the head, also where it is stored transposed; ``(vocab, dim)`` of an embedding; ``(width,)`` of a norm."""
        stored = self._weights.get(f"{site}.weight")
        if stored is None and site == self.spec.head:
            stored = self._weights.get(f"{self.spec.embedding}.weight")
        if stored is None:
            raise KeyError(f"the base directory has no weight for {site}")
        stored = self.as_served(stored)
        return stored.T.contiguous() if self._sites[site].transposed else stored

    def bias(self, site: str) -> Tensor:
        """``(out,)``; zeros where the site has none."""
        stored = self._weights.get(f"{site}.bias") if self._sites[site].has_bias else None
        return torch.zeros(self._sites[site].out_features, dtype=self.compute) if stored is None else self.as_served(stored)

    def parameter(self, name: str) -> Tensor | None:
        """Any stored tensor by its full name, also one of no site (positions, a pooler's weight); None when there is none."""
        stored = self._weights.get(name)
        return None if stored is None else self.as_served(stored)

    def as_served(self, stored: Tensor) -> Tensor:
        """Rounded to the dtype that the engine serves, which is what an edit must be exact against."""
        return stored.to(self.dtype).to(self.compute)


def stored_shape(spec: SiteSpec) -> tuple[int, ...]:
    """The shape of a site's weight in a file: transposed for Conv1D."""
    if spec.kind == "norm":
        return (spec.out_features,)
    if spec.kind == "embedding" or spec.transposed:
        return (spec.in_features, spec.out_features)
    return (spec.out_features, spec.in_features)
