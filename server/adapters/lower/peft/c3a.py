"""C3A (Chen et al. 2024) as PEFT stores it: a block-circulant change, one kernel a block."""

from __future__ import annotations

import torch

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.delta import add_dense, linears_with
from server.adapters.lower.method import COMMON_FIELDS, Method, no_effect, only
from server.adapters.lower.peft.replaced import lower_biases, lower_replaced_modules
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """Entry ``(i, j)`` of a block is ``kernel[(j - i) mod b] / in``."""
    program = Program()
    for spec in linears_with(source, base, "c3a_kernel"):
        kernel = source.take(spec.name, "c3a_kernel", (None, None, None))
        if kernel is None:
            continue
        rows, columns, size = kernel.shape
        if rows * size != spec.out_features or columns * size != spec.in_features:
            source.fault(
                "wrong_shape",
                f"{spec.name}.c3a_kernel",
                "the blocks do not make up the weight",
                f"(out / b, in / b, b) with out = {spec.out_features}, in = {spec.in_features}",
                str(tuple(kernel.shape)),
            )
            continue
        steps = torch.arange(size)
        blocks = kernel.to(base.compute)[:, :, (steps - steps[:, None]) % size]
        delta = blocks.transpose(1, 2).reshape(spec.out_features, spec.in_features)
        add_dense(program.linear(spec.name), delta / spec.in_features)
    lower_biases(source, base, program)
    lower_replaced_modules(source, base, program)
    return program


METHOD = Method(
    name="C3A",
    summary="a block-circulant change, as a dense one",
    fields={
        **COMMON_FIELDS,
        "bias": only("none", "all", "c3a_only"),
        "modules_to_save": no_effect,
        # The kernels' shapes say the block sizes.
        "block_size": no_effect,
        "block_size_pattern": no_effect,
        **dict.fromkeys(("target_modules", "layers_to_transform", "layers_pattern", "init_weights"), no_effect),
    },
    lower=lower,
)
