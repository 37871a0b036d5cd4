"""What lowerings do alike when a method changes a linear's weight: find the linears, and put the change in its cheapest exact form.

Knows linears and bytes, no method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import LinearEdit
from server.adapters.lower.base import Base
from server.adapters.lower.source import Source


def linears_with(source: Source, base: Base, *tails: str) -> Iterator[SiteSpec]:
    """Linears (and the head) that have a tensor under one of these tails; such a tensor anywhere else is a fault."""
    for site in source.sites:
        spec = base.spec.site(site)
        if spec is None or not any(source.has(site, tail) for tail in tails):
            continue
        if spec.kind in ("linear", "head"):
            yield spec
        else:
            source.fault("wrong_module", site, f"the method is defined on linears, not on a module of kind {spec.kind}")


def take_all(source: Source, site: str, shapes: Mapping[str, tuple[int | None, ...]]) -> list[Tensor] | None:
    """Tensors that belong together, in order; None, with the faults recorded, when one is missing or does not fit."""
    found = []
    for tail, shape in shapes.items():
        if not source.has(site, tail):
            source.fault("missing_tensor", f"{site}.{tail}", "the module has others of the method's tensors but not this one")
        found.append(source.take(site, tail, shape))
    complete = [tensor for tensor in found if tensor is not None]
    return complete if len(complete) == len(found) else None


def add_dense(edit: LinearEdit, delta: Tensor) -> None:
    """Add ``delta (out, in)`` to the weight."""
    edit.dense = delta if edit.dense is None else edit.dense + delta


def add_product(edit: LinearEdit, down: Tensor, up: Tensor) -> None:
    """Add ``up.T @ down`` to the weight, ``down (rank, in)``, ``up (rank, out)``: as low rank where that takes fewer bytes, else dense."""
    rank, size_in, size_out = down.shape[0], down.shape[1], up.shape[1]
    if rank == 0:
        return
    if rank * (size_in + size_out) < size_in * size_out:
        edit.down, edit.up = down, up
    else:
        add_dense(edit, up.T @ down)
