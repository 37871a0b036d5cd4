"""OFT (Qiu et al. 2023) as PEFT 0.16 and later store it: every block of ``b`` inputs is rotated before W, ``x_blk R_blk``; the bias is untouched.

R comes from a skew matrix Q, whose strict upper triangle is stored: the Cayley transform, or its Neumann series.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, boolean, integer, no_effect, number
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS, Group, lower_groups
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """``oft_R.weight (blocks, b (b - 1) / 2)``; with ``block_share`` one block for all."""

    def lower_site(program: Program, group: Group) -> None:
        stored, width = group["oft_R.weight"], group.spec.in_features
        count, elements = stored.shape
        size = (1 + math.isqrt(1 + 8 * elements)) // 2
        covered = width // size * size if source.config.get("block_share") and count == 1 else count * size
        if size * (size - 1) // 2 != elements or covered != width:
            source.fault(
                "wrong_shape",
                f"{group.site}.oft_R.weight",
                "its blocks do not divide the inputs",
                f"(blocks, b (b - 1) / 2) with blocks * b = {width}, or one shared block",
                str(tuple(stored.shape)),
            )
            return
        skew = _skew(stored, size)
        if source.config.get("coft"):
            skew = _project(skew, source.config.get("eps", 6e-5))
        if source.config.get("use_cayley_neumann", True):
            program.linear(group.site).rotation = _neumann(skew, source.config.get("num_cayley_neumann_terms", 5))
        else:
            program.linear(group.site).rotation = cayley(source, group.site, skew)

    program = lower_groups(source, base, "oft_", {"oft_R.weight": ("n", "elements")}, lower_site)
    if source.config.get("use_cayley_neumann", True) and _is_before_series_changed(source.config.get("peft_version")):
        program.notes["rotation"] = "saved before PEFT 0.18, which changed the series; computed as PEFT 0.18 and later do"
    return program


def cayley(source: Source, site: str, skew: Tensor) -> Tensor | None:
    """``(I - Q) (I + Q)⁻¹`` of skew matrices ``(…, b, b)``. Numbers so large that it cannot be computed are a fault."""
    identity = torch.eye(skew.shape[-1], dtype=skew.dtype)
    try:
        rotation: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
    except RuntimeError:
        source.fault("non_finite", site, "the rotation cannot be computed from numbers as large as these")
        return None
    return rotation


def _is_before_series_changed(version: object) -> bool:
    """Configs name PEFT's version since 0.18."""
    found = re.match(r"(\d{1,4})\.(\d{1,4})", version) if isinstance(version, str) else None
    return found is None or (int(found[1]), int(found[2])) < (0, 18)


def _skew(upper: Tensor, size: int) -> Tensor:
    """``(blocks, b (b - 1) / 2)``, row by row → ``(blocks, b, b)``."""
    matrix = torch.zeros(upper.shape[0], size, size, dtype=upper.dtype)
    rows, columns = torch.triu_indices(size, size, 1)
    matrix[:, rows, columns] = upper
    return matrix - matrix.transpose(1, 2)


def _project(skew: Tensor, eps: float) -> Tensor:
    """Constrained OFT: each block within a ball whose radius is ``eps / sqrt(blocks)``."""
    radius = eps / math.sqrt(skew.shape[0])
    norm = torch.linalg.matrix_norm(skew, keepdim=True)
    return torch.where(norm <= radius, skew, skew * (radius / norm))


def _neumann(skew: Tensor, terms: int) -> Tensor:
    """``I + 2Q + 2Q² + … + Q^(n-1)``, where PEFT gives three terms one more power than they should have."""
    rotation = torch.eye(skew.shape[-1], dtype=skew.dtype).repeat(skew.shape[0], 1, 1)
    if terms > 1:
        rotation = rotation + 2.0 * skew
    if terms > 2:
        power = skew @ skew
        rotation = rotation + 2.0 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            rotation = rotation + 2.0 * power
        rotation = rotation + power @ skew
    return rotation


METHOD = Method(
    name="OFT",
    summary="a rotation of the inputs, block by block",
    fields={
        **WRAPPED_FIELDS,
        # The tensors show the blocks.
        "r": no_effect,
        "oft_block_size": no_effect,
        "module_dropout": no_effect,
        "coft": boolean,
        "eps": number(0.0, 1e6),
        "block_share": boolean,
        "use_cayley_neumann": boolean,
        "num_cayley_neumann_terms": integer(1, 64),
    },
    lower=lower,
)
