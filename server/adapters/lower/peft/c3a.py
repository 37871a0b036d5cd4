"""C3A (Chen et al. 2024) as PEFT stores it: a block-circulant change, one kernel a block."""

from __future__ import annotations

import torch

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, no_effect
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS, Group, fills_module, lower_groups
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """``c3a_kernel (out / b, in / b, b)``: entry ``(i, j)`` of a block is ``kernel[(j - i) mod b] / in``."""

    def lower_site(program: Program, group: Group) -> None:
        kernel, spec, size = group["c3a_kernel"], group.spec, group.sizes["b"]
        if not fills_module(source, group, group.sizes["rows"] * size, group.sizes["columns"] * size):
            return
        source.reserve(spec.out_features * spec.in_features)
        steps = torch.arange(size)
        blocks = kernel[:, :, (steps - steps[:, None]) % size]
        delta = blocks.transpose(1, 2).reshape(spec.out_features, spec.in_features)
        program.linear(group.site).dense = delta / spec.in_features

    return lower_groups(source, base, "c3a_", {"c3a_kernel": ("rows", "columns", "b")}, lower_site)


METHOD = Method(
    name="C3A",
    summary="a block-circulant change, as a dense one",
    # The kernels' shapes say the block sizes.
    fields={**WRAPPED_FIELDS, "block_size": no_effect, "block_size_pattern": no_effect},
    lower=lower,
)
