"""HRA (Yuan et al. 2024) as PEFT stores it: ``W' = W (I - 2 u₁u₁ᵀ) (I - 2 u₂u₂ᵀ) …`` with the unit vectors of ``hra_u (in, r)``.

The product of reflections is ``I - U T Uᵀ`` with an upper triangular T (the compact WY form), so that the change has rank ``r``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, boolean, integer
from server.adapters.lower.peft.wrapped import MAX_RANK, WRAPPED_FIELDS, Group, lower_groups
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """``down = Uᵀ``, ``up = -(W U T)ᵀ``; with ``apply_GS`` U is made orthonormal first, and ``T = 2 I``."""
    rank = source.config.get("r", 8)

    def lower_site(program: Program, group: Group) -> None:
        vectors = group["hra_u"]
        if rank > group.spec.in_features:
            source.fault("wrong_rank", group.site, "more reflections than inputs", str(group.spec.in_features), str(rank))
            return
        source.reserve(rank * (group.spec.in_features + group.spec.out_features))
        if source.config.get("apply_GS"):
            # The signs of the columns, which Gram-Schmidt and QR choose differently, cancel out.
            vectors = torch.linalg.qr(vectors).Q
            mixed = 2.0 * vectors
        else:
            vectors = vectors / torch.linalg.vector_norm(vectors, dim=0)
            mixed = vectors @ _compact(vectors)
        edit = program.linear(group.site)
        edit.down, edit.up = vectors.T, -(base.weight(group.site) @ mixed).T

    return lower_groups(source, base, "hra_", {"hra_u": ("in", rank)}, lower_site)


def _compact(vectors: Tensor) -> Tensor:
    """T ``(r, r)`` of unit columns ``(in, r)``, column by column: ``t_k = -2 T_{<k} U_{<k}ᵀ u_k``, and 2 on the diagonal."""
    products = vectors.T @ vectors
    rank = vectors.shape[1]
    triangular = torch.zeros(rank, rank, dtype=vectors.dtype)
    for index in range(rank):
        triangular[:index, index] = -2.0 * (triangular[:index, :index] @ products[:index, index])
        triangular[index, index] = 2.0
    return triangular


METHOD = Method(
    name="HRA",
    summary="low rank: the product of reflections, times the base's weight",
    fields={**WRAPPED_FIELDS, "r": integer(1, MAX_RANK), "apply_GS": boolean},
    lower=lower,
)
