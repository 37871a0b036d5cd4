"""Programs: the one normal form that every adapter is lowered to, whatever its method.

A program is a set of edits on named sites of the base model, plus what a sequence starts with. This module knows
tensors and shapes; it knows no checkpoint format, no file and no method. See docs/ARCHITECTURE.md, "Programs".

Orientation: a linear maps ``x (…, in)`` to ``y (…, out)``; ``down`` is ``(rank, in)`` and ``up`` is ``(rank, out)``, so
the rank-``r`` term is ``(x @ down.T) @ up``. Scaling is already folded into ``up``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TypeVar

import torch
from torch import Tensor


@dataclass(slots=True)
class LinearEdit:
    """``y = out_scale * base(in_scale * x) + (x @ down.T) @ up + shift + x @ dense.T``; absent terms are None.

    ``in_scale (in,)``, ``out_scale (out,)`` and ``shift (out,)`` are fp32. ``down (rank, in)``, ``up (rank, out)`` and
    ``dense (out, in)`` have the base's dtype. ``out_scale`` multiplies the base's output including its bias.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    shift: Tensor | None = None
    dense: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.down is None else int(self.down.shape[0])


@dataclass(slots=True)
class NormEdit:
    """Replaced norm parameters ``(hidden,)``, never ratios. ``bias`` only where the norm has one."""

    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(slots=True)
class EmbedEdit:
    """``y = out_scale * (E[id] + down[id] @ up)``; then ``rows`` replace the result for ``row_ids``.

    ``down (vocab, rank)``, ``up (rank, dim)``, ``out_scale (dim,)`` fp32, ``row_ids (n,)`` int64 ascending,
    ``rows (n, dim)``. A whole replaced table is ``table (vocab, dim)``, used instead of E.
    Everything is stated before the module's own embedding scale (Gemma), which is applied to the sum.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    out_scale: Tensor | None = None
    row_ids: Tensor | None = None
    rows: Tensor | None = None
    table: Tensor | None = None


@dataclass(slots=True)
class HeadEdit:
    """A replaced output head: ``weight (vocab, hidden)`` instead of the base's, or ``rows`` of it for ``row_ids``.

    Low-rank terms on the head are a LinearEdit on the same site and are added to this result.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    row_ids: Tensor | None = None
    rows: Tensor | None = None


Edit = LinearEdit | NormEdit | EmbedEdit | HeadEdit
E = TypeVar("E", LinearEdit, EmbedEdit)


@dataclass(slots=True)
class Program:
    """A lowered adapter. Every tensor is finite, contiguous and on the CPU.

    ``edits`` maps a site name to its edits (the head may hold a LinearEdit and a HeadEdit).
    ``invocation_tokens``: when not empty, the program acts only from the start of the last occurrence of these tokens in
    the prompt; before it, and everywhere when they do not occur, the row is the base model.
    """

    edits: dict[str, list[Edit]] = field(default_factory=dict)
    invocation_tokens: tuple[int, ...] = ()

    def add(self, site: str, edit: Edit) -> None:
        self.edits.setdefault(site, []).append(edit)

    def linear(self, site: str) -> LinearEdit:
        """The site's LinearEdit, made on first use, so that several parts of a checkpoint can meet in one edit."""
        return self._first(site, LinearEdit)

    def embed(self, site: str) -> EmbedEdit:
        """The same for an EmbedEdit."""
        return self._first(site, EmbedEdit)

    def _first(self, site: str, kind: type[E]) -> E:
        for edit in self.edits.get(site, ()):
            if isinstance(edit, kind):
                return edit
        made = kind()
        self.add(site, made)
        return made

    def tensors(self) -> Iterator[tuple[str, Edit, str, Tensor]]:
        """Every tensor as (site, edit, field name, tensor)."""
        for site, edits in self.edits.items():
            for edit in edits:
                for item in fields(edit):
                    value = getattr(edit, item.name)
                    if value is not None:
                        yield site, edit, item.name, value

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for *_, tensor in self.tensors())

    def first_non_finite(self) -> str | None:
        """The first tensor that holds NaN or infinity, as ``site.field``; None when all are finite."""
        for site, _, name, tensor in self.tensors():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return f"{site}.{name}"
        return None
