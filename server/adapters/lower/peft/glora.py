"""GLoRA (Chavan et al. 2023) as PEFT stores it: ``W' = W + W * A + B`` and ``b' = b + b * D + E + W C``, each part a matrix, vector or number."""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.cheapest import product, set_cheapest
from server.adapters.lower.method import Method, no_effect
from server.adapters.lower.peft.wrapped import LINEARS, WRAPPED_FIELDS, with_saved_modules
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """A vector or number A is an output scale (without the bias), a low-rank A a dense change; B a low-rank one; C, D, E shift."""
    program = Program()
    for spec in source.sites("glora_", LINEARS):
        _lower_weight(source, base, program, spec)
        _lower_bias(source, base, program, spec)
    return with_saved_modules(source, base, program)


def _lower_weight(source: Source, base: Base, program: Program, spec: SiteSpec) -> None:
    edit = program.linear(spec.name)
    added = _pair(source, base, spec.name, "B", spec.out_features, spec.in_features)
    if added is None and (column := _vector(source, base, spec.name, "B", (spec.out_features, 1))) is not None:
        # One number a row, in every column: rank 1.
        added = column.expand(spec.out_features)[:, None], torch.ones(1, spec.in_features, dtype=base.compute)
    if (pair := _pair(source, base, spec.name, "A", spec.out_features, spec.in_features)) is not None:
        source.reserve(spec.out_features * spec.in_features)
        edit.dense = base.weight(spec.name) * (pair[0] @ pair[1])
        if added is not None:
            edit.dense += added[0] @ added[1]
        return
    if (gain := _vector(source, base, spec.name, "A", (spec.out_features, 1))) is not None:
        edit.out_scale = 1 + gain.expand(spec.out_features)
    if added is not None:
        set_cheapest(source, edit, product(added[1], added[0].T))


def _lower_bias(source: Source, base: Base, program: Program, spec: SiteSpec) -> None:
    """b is the stored bias where ``bias`` had it trained too. The output scale also meets the base's bias, which is taken out here."""
    stored = source.take(spec.name, "base_layer.bias", (spec.out_features,))
    bias = original = base.bias(spec.name)
    if stored is not None:
        bias = stored.to(base.compute)
    wanted = bias
    if (pair := _pair(source, base, spec.name, "C", spec.in_features, 1)) is not None:
        wanted = wanted + base.weight(spec.name) @ (pair[0] @ pair[1])[:, 0]
    elif (column := _vector(source, base, spec.name, "C", (spec.in_features, 1))) is not None:
        wanted = wanted + base.weight(spec.name) @ column.expand(spec.in_features)
    if (gain := _vector(source, base, spec.name, "D", (spec.out_features,))) is not None:
        wanted = wanted + bias * gain
    if (added := _vector(source, base, spec.name, "E", (spec.out_features,))) is not None:
        wanted = wanted + added
    edit = program.linear(spec.name)
    shift = wanted - (original if edit.out_scale is None else edit.out_scale * original)
    if not bool(shift.any()):
        return
    if spec.has_bias:
        edit.shift = shift
    else:
        source.fault(
            "unmatched_tensor",
            f"{spec.name}.glora_C",
            'the base model has no bias here, which C, D and E would change; train with config_C and config_D_E "none"',
        )


def _pair(source: Source, base: Base, site: str, part: str, rows: int, columns: int) -> tuple[Tensor, Tensor] | None:
    """``Xd (rows, r)`` and ``Xu (r, columns)`` of one part."""
    left = source.take(site, f"glora_{part}.Xd", (rows, None))
    right = source.take(site, f"glora_{part}.Xu", (None, columns))
    if left is None and right is None:
        return None
    if left is None or right is None or left.shape[1] != right.shape[0]:
        source.fault("missing_tensor", f"{site}.glora_{part}", "Xd and Xu of one rank are needed")
        return None
    return left.to(base.compute), right.to(base.compute)


def _vector(source: Source, base: Base, site: str, part: str, shape: tuple[int, ...]) -> Tensor | None:
    """``X`` of one part, one number or as many as ``shape`` says, flat; None where the part is empty, which is stored as zeros."""
    empty = source.take(site, f"glora_{part}.zeros")
    if empty is not None and bool(empty.any()):
        source.fault("unused_tensor", f"{site}.glora_{part}.zeros", "an unused part must be zero")
    vector = source.take(site, f"glora_{part}.X")
    if vector is None:
        return None
    if tuple(vector.shape) not in (shape, (1,)):
        source.fault(
            "wrong_shape", f"{site}.glora_{part}.X", "one number, or one a channel", str(shape), str(tuple(vector.shape))
        )
        return None
    return vector.reshape(-1).to(base.compute)


METHOD = Method(
    name="GLORA",
    summary="an output scale or a dense change, low rank, and a shift",
    # The tensors' keys and shapes say the form of every part.
    fields={**WRAPPED_FIELDS, **dict.fromkeys(("r", "config_A_B", "config_C", "config_D_E"), no_effect)},
    lower=lower,
)
