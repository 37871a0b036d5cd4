"""BOFT (Liu et al. 2024) with one butterfly factor, as PEFT stores it: ``y = s * (W (x R)) + b``, R from the Cayley transform of each block."""

from __future__ import annotations

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, no_effect
from server.adapters.lower.oft import cayley
from server.adapters.lower.source import Source
from server.adapters.lower.wrapped import WRAPPED_FIELDS, Group, lower_groups


def lower(source: Source, base: Base) -> Program:
    """``boft_R (factors, blocks, b, b)``, ``boft_s (out, 1)``. The scale leaves the bias alone, so that the shift puts it back."""

    def lower_site(program: Program, group: Group) -> None:
        site, sizes = group.site, group.sizes
        if sizes["factors"] != 1:
            source.fault(
                "wrong_shape",
                f"{site}.boft_R",
                "more than one butterfly factor is not served: PEFT computes it only with an extension for CUDA",
                "boft_n_butterfly_factor 1",
                str(sizes["factors"]),
            )
            return
        if sizes["n"] * sizes["b"] != group.spec.in_features:
            source.fault(
                "wrong_shape",
                f"{site}.boft_R",
                "its blocks do not divide the inputs",
                str(group.spec.in_features),
                str(sizes["n"] * sizes["b"]),
            )
            return
        blocks = group["boft_R"][0]
        edit = program.linear(site)
        edit.rotation = cayley(source, site, 0.5 * (blocks - blocks.transpose(1, 2)))
        edit.out_scale = group["boft_s"][:, 0]
        if group.spec.has_bias:
            bias = base.bias(site)
            edit.shift = bias - edit.out_scale * bias

    return lower_groups(source, base, "boft_", {"boft_R": ("factors", "n", "b", "b"), "boft_s": ("out", 1)}, lower_site)


METHOD = Method(
    name="BOFT",
    summary="a rotation of the inputs and an output scale; more than one butterfly factor is refused",
    fields={
        **WRAPPED_FIELDS,
        # The tensors show the blocks and the factors; without its extension PEFT makes one factor whatever the config says.
        "boft_block_size": no_effect,
        "boft_block_num": no_effect,
        "boft_n_butterfly_factor": no_effect,
        "boft_dropout": no_effect,
    },
    lower=lower,
)
