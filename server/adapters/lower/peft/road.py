"""RoAd (Liao and Monz 2024) as PEFT stores it: pairs of outputs are rotated and scaled, ``y' = c₁ * y + c₂ * swap(y)``, the bias included.

``c₁ = alpha cos(theta)``, ``c₂ = alpha sin(theta)``; output ``i`` of a group's first half is paired with ``i`` of its second.
"""

from __future__ import annotations

from torch import Tensor

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, integer, only
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS, Group, lower_groups
from server.adapters.lower.source import Source

_PER_OUTPUT = {"road_1": 0.5, "road_2": 1, "road_4": 2}


def lower(source: Source, base: Base) -> Program:
    """An output scale c₁ and pairs with c₂."""
    variant, size = source.config.get("variant", "road_1"), source.config.get("group_size", 64)

    def lower_site(program: Program, group: Group) -> None:
        outputs = group.spec.out_features
        if outputs % size or group.sizes["n"] != outputs * _PER_OUTPUT[variant]:
            source.fault(
                "wrong_shape",
                f"{group.site}.road_theta",
                f"{variant} in groups of {size} does not fit the module",
                f"{outputs * _PER_OUTPUT[variant]:g} numbers",
                str(group.sizes["n"]),
            )
            return
        edit = program.linear(group.site)
        edit.out_scale, edit.pair_scale = _columns(variant, size, group["road_theta"], group["road_alpha"])
        edit.pair_group = size

    return lower_groups(source, base, "road_", {"road_theta": ("n",), "road_alpha": ("n",)}, lower_site)


def _columns(variant: str, size: int, theta: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """c₁ and c₂ ``(out,)``. road_1 has a number a pair; road_2 one an output; road_4 two, in every group those of c₁ before those of c₂."""
    if variant == "road_4":
        angles, lengths = theta.view(-1, 2, size), alpha.view(-1, 2, size)
        return (lengths[:, 0] * angles[:, 0].cos()).flatten(), (lengths[:, 1] * angles[:, 1].sin()).flatten()
    if variant == "road_1":
        theta, alpha = (vector.view(-1, size // 2).repeat_interleave(2, dim=0).flatten() for vector in (theta, alpha))
    return alpha * theta.cos(), alpha * theta.sin()


def _group_size(value: object) -> str | None:
    return integer(2, 65536)(value) if not isinstance(value, int) or value % 2 == 0 else "an even number"


METHOD = Method(
    name="ROAD",
    summary="an output scale and rotated pairs of outputs",
    fields={**WRAPPED_FIELDS, "variant": only(*_PER_OUTPUT), "group_size": _group_size},
    lower=lower,
)
