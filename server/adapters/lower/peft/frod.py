"""FRoD as PEFT stores it: the weight in a basis that modules of one role share, with trained diagonal and sparse coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.delta import add_dense, linears_with, take_all
from server.adapters.lower.method import COMMON_FIELDS, Method, no_effect, only
from server.adapters.lower.peft.replaced import lower_biases, lower_replaced_modules
from server.adapters.lower.source import Source

_NEGLIGIBLE = 1e-12


def lower(source: Source, base: Base) -> Program:
    """``W' = U (S + diag(lambda)) V.T``: V and the places of S are stored per role, U follows from the base's weight and V."""
    program = Program()
    shared: dict[str, tuple[Tensor, Tensor] | None] = {}
    for spec in linears_with(source, base, "frod_lambda_l", "frod_lambda_s_values"):
        role = role_of(spec.name)
        if role not in shared:
            shared[role] = _take_shared(source, role, spec.in_features)
        found = take_all(source, spec.name, {"frod_lambda_l": (spec.in_features,), "frod_lambda_s_values": (None,)})
        projection = shared[role]
        if found is None or projection is None:
            continue
        _lower_linear(source, base, program, spec, found, projection)
    lower_biases(source, base, program)
    lower_replaced_modules(source, base, program)
    return program


def _lower_linear(
    source: Source, base: Base, program: Program, spec: SiteSpec, found: list[Tensor], projection: tuple[Tensor, Tensor]
) -> None:
    basis, places = projection
    diagonal, values = (tensor.to(base.compute) for tensor in found)
    if basis.shape[0] != spec.in_features or places.shape[1] != values.shape[0]:
        source.fault("wrong_shape", spec.name, "the shared basis or its sparse places do not fit this module")
        return
    weight = base.weight(spec.name)
    coefficients = torch.diag(diagonal)
    coefficients.index_put_((places[0], places[1]), values, accumulate=True)
    rebuilt = _left_basis(weight, basis) @ coefficients @ basis.to(base.compute).T
    add_dense(program.linear(spec.name), rebuilt - weight)


def _left_basis(weight: Tensor, basis: Tensor) -> Tensor:
    """U: the columns of ``solve(V, W.T).T``, normalised, in fp64 as PEFT computes it."""
    wide, right = weight.double(), basis.double()
    try:
        columns = torch.linalg.solve(right, wide.T).T
    except RuntimeError:  # V is singular
        columns = wide @ torch.linalg.pinv(right, rtol=1e-6).T
    norms = torch.linalg.vector_norm(columns, dim=0)
    kept = norms > _NEGLIGIBLE
    return torch.where(kept, columns / norms.where(kept, torch.ones_like(norms)), 0.0).to(weight.dtype)


def _take_shared(source: Source, role: str, width: int) -> tuple[Tensor, Tensor] | None:
    """V ``(in, in)`` and the places of S ``(2, n)`` of one role."""
    basis = source.take_shared(f"frod_V.{role}", (width, width))
    places = source.take_shared(f"frod_s_indices.{role}", (2, None), integers=True)
    size = source.take_shared(f"frod_s_size.{role}", (2,), integers=True)
    if basis is None or places is None or size is None:
        source.fault(
            "missing_tensor", f"base_model.frod_V.{role}", "the shared basis, its sparse places and their size are needed"
        )
        return None
    if size.tolist() != [width, width] or bool(((places < 0) | (places >= width)).any()):
        source.fault("wrong_shape", f"base_model.frod_s_indices.{role}", "a place lies outside the basis", f"below {width}")
        return None
    return basis, places


def role_of(site: str) -> str:
    """What modules share a basis by: the last two parts of their paths, as PEFT names them."""
    parts = site.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


METHOD = Method(
    name="FROD",
    summary="a dense change: the base's weight in the stored basis, with other coefficients (`save_projection: true` only)",
    fields={
        **COMMON_FIELDS,
        # A basis that is computed again may differ in signs, which the sparse coefficients depend on.
        "save_projection": only(True),
        "bias": only("none", "all", "frod_only"),
        "modules_to_save": no_effect,
        "projection_prng_key": no_effect,
        **dict.fromkeys(("target_modules", "layers_to_transform", "layers_pattern"), no_effect),
        **dict.fromkeys(("frod_dropout", "fan_in_fan_out", "init_weights", "sparse_rate", "regularization_alpha"), no_effect),
        **dict.fromkeys(("progressbar", "runtime_offload_base_weight"), no_effect),
    },
    lower=lower,
)
