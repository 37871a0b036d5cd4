"""A fine-tuned checkpoint of the base, whole or in part, as an adapter, in Medley's own format (docs/FORMATS.md).

Tensors are named like the base's parameters. What equals the base's is dropped; what differs becomes an exact edit, or with ``rank`` the
best low-rank approximation of the difference, with the error in the program's notes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import HeadEdit, NormEdit, Program
from server.adapters.lower.base import Base, stored_shape
from server.adapters.lower.cheapest import dense, low_rank, set_cheapest
from server.adapters.lower.method import Method, integer, no_effect, optional
from server.adapters.lower.source import Source

_MAX_RANK = 4096


@dataclass(slots=True)
class Loss:
    """Squared Frobenius norms: of all differences, and of what the approximation leaves out of them."""

    total: float = 0.0
    lost: float = 0.0

    @property
    def relative(self) -> float:
        return math.sqrt(self.lost / self.total) if self.total else 0.0


@dataclass(frozen=True, slots=True)
class TableChange:
    """How an embedding, or a head, differs: some rows, all of them, or ``left (vocab, rank) @ right (rank, dim)``."""

    row_ids: Tensor | None = None
    rows: Tensor | None = None
    table: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None


def lower(source: Source, base: Base) -> Program:
    """Every parameter that differs from the base's, in its place."""
    program, loss = Program(), Loss()
    rank = source.config.get("rank")
    for spec in source.sites():
        if spec.kind == "norm":
            _lower_norm(source, base, program, spec, loss)
        elif spec.kind == "linear":
            _lower_linear(source, base, program, spec, loss, rank)
    _lower_tables(source, base, program, loss, rank)
    _check_others(source, base)
    if rank is not None:
        program.notes = {"rank": rank, "relative_error": loss.relative}
    return program


def nearest(delta: Tensor, rank: int, loss: Loss) -> tuple[Tensor, Tensor]:
    """``down (rank, in)`` and ``up (rank, out)`` such that ``up.T @ down`` is as near to ``delta (out, in)`` as any of that rank.

    The truncated singular value decomposition, through the eigenvectors of the smaller Gram matrix in fp64: several times faster, and
    exact to fp32.
    """
    wide = delta.double()
    is_tall = delta.shape[0] >= delta.shape[1]
    values, vectors = torch.linalg.eigh(wide.T @ wide if is_tall else wide @ wide.T)
    kept = vectors[:, -rank:]
    loss.lost += float(values[:-rank].clamp_(min=0).sum())
    down, up = (kept.T, (wide @ kept).T) if is_tall else (kept.T @ wide, kept.T)
    return down.to(delta.dtype), up.to(delta.dtype)


def _lower_norm(source: Source, base: Base, program: Program, spec: SiteSpec, loss: Loss) -> None:
    changed = {}
    for tail in ("weight", "bias"):
        tensor = source.take(spec.name, tail, (spec.out_features,))
        if tensor is None:
            continue
        if tail == "bias" and not spec.has_bias:
            source.fault("unmatched_tensor", f"{spec.name}.bias", "the base model's norm has no bias; leave the tensor out")
            continue
        original = base.weight(spec.name) if tail == "weight" else base.bias(spec.name)
        if _difference(source, base, f"{spec.name}.{tail}", tensor, original, loss) is not None:
            changed[tail] = tensor.to(base.compute)
    if changed:
        program.add(spec.name, NormEdit(**changed))


def _lower_linear(source: Source, base: Base, program: Program, spec: SiteSpec, loss: Loss, rank: int | None) -> None:
    stored = source.take(spec.name, "weight", stored_shape(spec))
    if stored is not None:
        weight = stored.T if spec.transposed else stored
        delta = _difference(source, base, f"{spec.name}.weight", weight, base.weight(spec.name), loss)
        if delta is not None:
            forms = [dense(spec, lambda: delta)]
            if rank is not None:
                forms.append(low_rank(spec, rank, lambda: nearest(delta, rank, loss)))
            set_cheapest(source, program.linear(spec.name), forms)
    _lower_bias(source, base, program, spec, loss)


def _lower_bias(source: Source, base: Base, program: Program, spec: SiteSpec, loss: Loss) -> None:
    bias = source.take(spec.name, "bias", (spec.out_features,))
    if bias is not None:
        shift = _difference(source, base, f"{spec.name}.bias", bias, base.bias(spec.name), loss)
        if shift is not None:
            program.linear(spec.name).shift = shift


def _lower_tables(source: Source, base: Base, program: Program, loss: Loss, rank: int | None) -> None:
    """The embedding and the head. A tied head follows the embedding, unless the checkpoint has one of its own that differs from it."""
    sites = {site: base.spec.site(site) for site in (base.spec.embedding, base.spec.head)}
    embedding, head = sites[base.spec.embedding], sites.get(base.spec.head)
    change, table = None, None
    if embedding is not None:
        table = source.take(embedding.name, "weight", stored_shape(embedding))
        change = _table_change(source, base, embedding, table, loss, rank)
        if change is not None:
            edit = program.embed(embedding.name)
            edit.row_ids, edit.rows, edit.table = change.row_ids, change.rows, change.table
            edit.down, edit.up = change.left, change.right
    if head is None:
        return
    own = source.take(head.name, "weight", stored_shape(head))
    is_copy = own is not None and table is not None and torch.equal(own, table)
    if not base.spec.tied_head or (own is not None and not is_copy):
        change = _table_change(source, base, head, own, loss, rank)
    if change is not None and change.left is not None and change.right is not None:
        product = program.linear(head.name)
        product.down, product.up = change.right, change.left.T
    elif change is not None:
        program.add(head.name, HeadEdit(weight=change.table, row_ids=change.row_ids, rows=change.rows))
    _lower_bias(source, base, program, head, loss)


def _table_change(
    source: Source, base: Base, spec: SiteSpec, table: Tensor | None, loss: Loss, rank: int | None
) -> TableChange | None:
    """The smallest exact form, unless a rank is given and takes fewer bytes."""
    if table is None:
        return None
    original = base.weight(spec.name)
    delta = _difference(source, base, f"{spec.name}.weight", table, original, loss)
    if delta is None:
        return None
    row_ids = (base.as_served(table) != original).any(dim=1).nonzero()[:, 0]
    if rank is not None and rank * sum(delta.shape) < row_ids.shape[0] * delta.shape[1]:
        right, left = nearest(delta, rank, loss)
        return TableChange(left=left.T, right=right)
    # Replaced rows are computed on top of the base's: with most of them replaced, a table of its own costs less.
    if row_ids.shape[0] <= table.shape[0] // 2:
        return TableChange(row_ids=row_ids, rows=table[row_ids].to(base.compute))
    return TableChange(table=table.to(base.compute))


def _difference(source: Source, base: Base, name: str, tensor: Tensor, original: Tensor, loss: Loss) -> Tensor | None:
    """``tensor - original``, or None where they are the same in the dtype that is served."""
    if torch.equal(base.as_served(tensor), original):
        return None
    delta = tensor.to(base.compute) - original
    square = float(delta.double().square().sum())
    if not math.isfinite(square) or not bool(torch.isfinite(delta).all()):
        source.fault(
            "non_finite", name, "the difference to the base model overflows; are there infinite numbers in the checkpoint?"
        )
        return None
    loss.total += square
    return delta


def _check_others(source: Source, base: Base) -> None:
    """Parameters of the base where nothing attaches (learned positions) must be the base's own."""
    for name in source.shared:
        original = base.parameter(name)
        if original is None:
            continue
        tensor = source.take_shared(name, tuple(original.shape))
        if tensor is not None and not torch.equal(base.as_served(tensor), original):
            source.fault("unmatched_tensor", name, "no program can change this parameter; it must equal the base model's")


METHOD = Method(
    name="FINE_TUNE",
    summary="a fine-tuned checkpoint: dense differences, norms, tables; with `rank` the best low-rank approximation",
    fields={
        "medley_type": no_effect,
        "base_model_name_or_path": no_effect,
        "rank": optional(integer(1, _MAX_RANK)),
    },
    lower=lower,
)
