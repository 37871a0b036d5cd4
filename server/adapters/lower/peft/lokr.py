"""LoKr (Yeh et al. 2024, LyCORIS) as PEFT stores it: ``Δ = kron(w1, w2) * alpha / r``; w1 and w2 whole or as two factors each."""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.cheapest import dense, kronecker, low_rank, set_cheapest
from server.adapters.lower.method import Method, no_effect
from server.adapters.lower.peft.loha import LYCORIS_FIELDS
from server.adapters.lower.peft.wrapped import Group, Shapes, fills_module, lower_groups, module_alpha, module_rank
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """A Kronecker term, low rank or dense: ``kron(P Q, R S) = kron(P, R) kron(Q, S)``."""

    def shapes(spec: SiteSpec) -> Shapes:
        return _factor(source, spec, "lokr_w1", "a", "b") | _factor(source, spec, "lokr_w2", "c", "d")

    def lower_site(program: Program, group: Group) -> None:
        spec, sizes = group.spec, group.sizes
        # A whole w1 and w2 do not show the rank, and the scale divides by it all the same.
        rank = module_rank(source, group.site, 8, sizes.get("r"))
        alpha = module_alpha(source, group.site, 8)
        if not fills_module(source, group, sizes["a"] * sizes["c"], sizes["b"] * sizes["d"]) or rank is None:
            return
        scale = alpha / rank
        left_up, left_down = _factors(group, "lokr_w1")
        right_up, right_down = _factors(group, "lokr_w2")
        left, right = left_up @ left_down, right_up @ right_down
        forms = (
            low_rank(
                spec,
                left_up.shape[1] * right_up.shape[1],
                lambda: (torch.kron(left_down, right_down), torch.kron(left_up, right_up).T * scale),
            ),
            kronecker(left * scale, right),
            dense(spec, lambda: torch.kron(left, right) * scale),
        )
        set_cheapest(source, program.linear(group.site), forms)

    return lower_groups(source, base, "lokr_", shapes, lower_site)


def _factor(source: Source, spec: SiteSpec, name: str, rows: str, columns: str) -> dict[str, tuple[str, str]]:
    if source.has(spec.name, name):
        return {name: (rows, columns)}
    return {f"{name}_a": (rows, "r"), f"{name}_b": ("r", columns)}


def _factors(group: Group, name: str) -> tuple[Tensor, Tensor]:
    """Two matrices whose product is the factor; of a whole one, itself and the identity on its shorter side."""
    if name not in group.tensors:
        return group[f"{name}_a"], group[f"{name}_b"]
    whole = group[name]
    rows, columns = whole.shape
    identity = torch.eye(min(rows, columns), dtype=whole.dtype)
    return (identity, whole) if rows < columns else (whole, identity)


METHOD = Method(
    name="LOKR",
    summary="a Kronecker term, low rank or a dense difference, whichever is smallest",
    fields={**LYCORIS_FIELDS, "decompose_both": no_effect, "decompose_factor": no_effect, "rank_dropout_scale": no_effect},
    lower=lower,
)
