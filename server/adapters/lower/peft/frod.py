"""FRoD as PEFT stores it: the weight in a basis that modules of one role share, with trained diagonal and sparse coefficients."""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, no_effect, only
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS, Group, lower_groups, shared_tensor
from server.adapters.lower.source import Source

_NEGLIGIBLE = 1e-12
_DIAGONAL, _VALUES = "frod_lambda_l", "frod_lambda_s_values"


def lower(source: Source, base: Base) -> Program:
    """``W' = U (S + diag(lambda)) V.T``: V and the places of S are stored per role, U follows from the base's weight and V."""
    shared: dict[str, tuple[Tensor, Tensor] | None] = {}

    def lower_site(program: Program, group: Group) -> None:
        spec, role = group.spec, role_of(group.site)
        if role not in shared:
            shared[role] = _take_shared(source, role, spec.in_features)
        found = shared[role]
        if found is None:
            return
        basis, places = found
        if basis.shape[0] != spec.in_features or places.shape[1] != group.sizes["n"]:
            expected = f"width {spec.in_features}, {group.sizes['n']} places"
            message = "the shared basis or its sparse places do not fit this module"
            source.fault("wrong_shape", group.site, message, expected, f"width {basis.shape[0]}, {places.shape[1]} places")
            return
        source.reserve(spec.in_features * spec.out_features)
        weight = base.weight(group.site)
        coefficients = torch.diag(group[_DIAGONAL])
        coefficients.index_put_((places[0], places[1]), group[_VALUES], accumulate=True)
        program.linear(group.site).dense = _left_basis(weight, basis) @ coefficients @ basis.to(base.compute).T - weight

    return lower_groups(source, base, "frod_", {_DIAGONAL: ("in",), _VALUES: ("n",)}, lower_site)


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
    basis = shared_tensor(source, f"frod_V.{role}", (width, width))
    places = shared_tensor(source, f"frod_s_indices.{role}", (2, None), integers=True)
    size = shared_tensor(source, f"frod_s_size.{role}", (2,), integers=True)
    if basis is None or places is None or size is None:
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
        **WRAPPED_FIELDS,
        # A basis that is computed again may differ in signs, which the sparse coefficients depend on.
        "save_projection": only(True),
        **dict.fromkeys(("projection_prng_key", "frod_dropout", "sparse_rate", "regularization_alpha", "progressbar"), no_effect),
        "runtime_offload_base_weight": no_effect,
    },
    lower=lower,
)
