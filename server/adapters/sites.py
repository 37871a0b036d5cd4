"""Sites: the modules of the base where edits attach, swapped in for the originals. No hooks, no patched forwards.

A site with nothing to do in a step is one attribute read away from the module that it wraps. Sites read the running step from a
``SiteState`` that the runner binds; rows and edits of the head are those of the sampled rows, not of all tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.adapters.apply import StepEdits, add_linear_terms, add_pairs, rotate_rows, scale_rows, shift_rows
from server.adapters.bank import Bank
from server.adapters.base_spec import BaseSpec, SiteSpec

Replaced = tuple[int, int, Tensor]
"""Rows ``[start, end)`` of a site's output are these instead: (start, end, rows)."""


class SiteState:
    """What all sites of one model share: the bank, and the edits of the step that is being run (None: none).

    ``virtual`` are the step's virtual tokens by the site whose output they stand for; only programs have any.
    """

    __slots__ = ("bank", "edits", "head_edits", "virtual")

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.edits: StepEdits | None = None
        self.head_edits: StepEdits | None = None
        self.virtual: dict[str, list[Replaced]] = {}


class Site(nn.Module):
    """A wrapped module. Attributes that models read off their submodules (``weight``, …) come from the original."""

    def __init__(self, inner: nn.Module, spec: SiteSpec, state: SiteState) -> None:
        super().__init__()
        self.inner = inner
        self.spec = spec
        self.state = state

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def put_virtual(self, y: Tensor) -> None:
        """Virtual tokens take the place of their rows of the output ``(…, T, hidden)``, as they are: no scale and no norm applies."""
        for start, end, rows in self.state.virtual.get(self.spec.name, ()):
            y[..., start:end, :] = rows


class LinearSite(Site):
    """A linear with the terms of ``ir.LinearEdit``, each row with its own program's."""

    def forward(self, x: Tensor) -> Tensor:
        edits = self.state.edits
        return self.inner(x) if edits is None else self.edited(x, edits)

    def edited(self, x: Tensor, edits: StepEdits) -> Tensor:
        work = edits.linear(self.spec.name, self.spec.in_features, self.spec.out_features)
        if work is None:
            return self.inner(x)  # type: ignore[no-any-return]
        vectors = self.state.bank.vectors
        rows = x.reshape(-1, x.shape[-1])
        scaled = rows if work.in_scale is None else scale_rows(rows, vectors, work.in_scale)
        z = self.base(rotate_rows(scaled, work) if work.rotates else scaled, edits)
        y = z if work.out_scale is None else scale_rows(z, vectors, work.out_scale)
        if work.pairs:
            y = y.clone() if y is z else y
            for pairs in work.pairs:
                add_pairs(y, z, vectors, pairs)
        add_linear_terms(y, rows, work)
        if work.shift is not None:
            shift_rows(y, vectors, work.shift)
        return y.view(*x.shape[:-1], y.shape[-1])

    def base(self, x: Tensor, edits: StepEdits) -> Tensor:
        """``base(x)`` for rows ``(N, in)``; what the linear terms are added to."""
        return self.inner(x)  # type: ignore[no-any-return]


class HeadSite(LinearSite):
    """The output head, on sampled rows ``(S, hidden)``: a replaced head or rows of it, then the linear terms."""

    def forward(self, x: Tensor) -> Tensor:
        edits = self.state.head_edits
        if edits is None:
            return self.inner(x)  # type: ignore[no-any-return]
        return self.edited(x, edits)

    def base(self, x: Tensor, edits: StepEdits) -> Tensor:
        y: Tensor = self.inner(x)
        for start, end, found in edits.extras(self.spec.name, "head."):
            if "weight" in found:
                y[start:end] = F.linear(x[start:end], found["weight"], found.get("bias"))
            if "rows" in found:
                y[start:end, found["row_ids"]] = F.linear(x[start:end], found["rows"])
        return y


class NormSite(Site):
    """Replaced norm parameters, by running the original module's own code with them on the rows concerned."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        edits = self.state.edits
        if edits is None:
            return y  # type: ignore[no-any-return]
        for start, end, found in edits.extras(self.spec.name, "norm."):
            rows = (..., slice(start, end), slice(None))
            y[rows] = torch.func.functional_call(self.inner, found, (x[rows],))
        self.put_virtual(y)
        return y  # type: ignore[no-any-return]


class EmbeddingSite(Site):
    """``out_scale * (E[id] + down[id] @ up)``, replaced rows, or a replaced table; then the module's own embedding scale."""

    def forward(self, ids: Tensor) -> Tensor:
        y = self.inner(ids)
        edits = self.state.edits
        if edits is None:
            return y  # type: ignore[no-any-return]
        for start, end, found in edits.extras(self.spec.name, "embed."):
            y[..., start:end, :] = self._embed(ids[..., start:end], found)
        self.put_virtual(y)
        return y  # type: ignore[no-any-return]

    def _embed(self, ids: Tensor, found: dict[str, Tensor]) -> Tensor:
        rows = F.embedding(ids, found.get("table", self.inner.weight))  # type: ignore[arg-type]
        if "down" in found:
            rows = rows + F.embedding(ids, found["down"]) @ found["up"]
        if "out_scale" in found:
            rows = (rows * found["out_scale"]).to(rows.dtype)
        if "rows" in found:
            place = torch.searchsorted(found["row_ids"], ids).clamp_(max=found["row_ids"].shape[0] - 1)
            replaced = found["row_ids"][place] == ids
            rows = torch.where(replaced[..., None], found["rows"][place], rows)
        if self.spec.embed_scale != 1.0:
            rows = rows * torch.tensor(self.spec.embed_scale, dtype=rows.dtype, device=rows.device)
        return rows


_KINDS: dict[str, type[Site]] = {
    "linear": LinearSite,
    "head": HeadSite,
    "norm": NormSite,
    "embedding": EmbeddingSite,
}


def attach(model: nn.Module, spec: BaseSpec, state: SiteState) -> None:
    """Swap every site of the base for its wrapper. Call after the weights are loaded."""
    for site in spec.sites:
        if site.kind not in _KINDS:
            continue
        parent_name, _, child = site.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, _KINDS[site.kind](getattr(parent, child), site, state))
