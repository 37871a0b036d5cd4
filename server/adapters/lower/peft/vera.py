"""VeRA (Kopiczko et al. 2024) as PEFT stores it: ``Δ = diag(b) B diag(d) A`` with one random A and B for all modules.

A ``(r, widest in)`` and B ``(widest out, r)`` are cut to each module; they are stored once, or drawn again from their seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, boolean, integer, no_effect
from server.adapters.lower.peft.wrapped import MAX_RANK, WRAPPED_FIELDS, Shapes, shared_tensor, tensor_groups, with_saved_modules
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    return lower_shared_projections(source, base, "vera")


def lower_shared_projections(source: Source, base: Base, prefix: str, *, halves: int = 1) -> Program:
    """Low rank at every module. With ``halves`` 2, d and A are twice as long, and the first half acts."""
    program = Program()
    rank = source.config.get("r", 256)
    shapes: Shapes = {f"{prefix}_lambda_b": ("out",), f"{prefix}_lambda_d": (rank * halves,)}
    groups = list(tensor_groups(source, base, f"{prefix}_lambda_", shapes))
    if groups:
        widest_in = max(group.spec.in_features for group in groups)
        widest_out = max(group.spec.out_features for group in groups)
        projections = _projections(source, prefix, (rank * halves, widest_in), (widest_out, rank))
        if projections is not None:
            first, second = (tensor.to(base.compute) for tensor in projections)
            for group in groups:
                source.reserve(rank * (group.spec.in_features + group.spec.out_features))
                edit = program.linear(group.site)
                edit.down = group[f"{prefix}_lambda_d"][:rank, None] * first[:rank, : group.spec.in_features]
                edit.up = (group[f"{prefix}_lambda_b"][:, None] * second[: group.spec.out_features]).T
    return with_saved_modules(source, base, program)


def _projections(source: Source, prefix: str, first: tuple[int, int], second: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """A and B, of these shapes: as stored, or as PEFT draws them on the CPU from ``projection_prng_key``, A before B."""
    names = (f"{prefix}_A", f"{prefix}_B")
    if source.config.get("save_projection", True):
        stored = [shared_tensor(source, name, shape) for name, shape in zip(names, (first, second), strict=True)]
        return None if stored[0] is None or stored[1] is None else (stored[0], stored[1])
    source.reserve(first[0] * first[1] + second[0] * second[1])
    generator = torch.Generator().manual_seed(source.config.get("projection_prng_key", 0))
    return (
        torch.nn.init.kaiming_uniform_(torch.empty(first, dtype=torch.float32), generator=generator),
        torch.nn.init.kaiming_uniform_(torch.empty(second, dtype=torch.float32), generator=generator),
    )


METHOD = Method(
    name="VERA",
    summary="low rank; its random matrices as stored, or drawn again from their seed",
    fields={
        **WRAPPED_FIELDS,
        "r": integer(1, MAX_RANK),
        "projection_prng_key": integer(0, 2**63 - 1),
        "save_projection": boolean,
        "vera_dropout": no_effect,
        "d_initial": no_effect,
    },
    lower=lower,
)
