"""IA3 (Liu et al. 2022) as PEFT stores it: one vector a module, on its input where it is a feed-forward module, else on its output."""

from __future__ import annotations

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import COMMON_FIELDS, Method, no_effect, only
from server.adapters.lower.peft.replaced import lower_replaced_modules
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """``(1, in)``: ``W (x * l) + b``; ``(out, 1)``: ``(W x + b) * l``, the bias included."""
    program = Program()
    for site in source.sites:
        spec = base.spec.site(site)
        if spec is None or not source.has(site, "ia3_l"):
            continue
        vector = source.take(site, "ia3_l", (None, None))
        if vector is None:
            continue
        if tuple(vector.shape) == (1, spec.in_features):
            program.linear(site).in_scale = vector[0].to(base.compute)
        elif tuple(vector.shape) == (spec.out_features, 1):
            program.linear(site).out_scale = vector[:, 0].to(base.compute)
        else:
            source.fault(
                "wrong_shape",
                f"{site}.ia3_l",
                "one number an input or an output is needed",
                f"(1, {spec.in_features}) or ({spec.out_features}, 1)",
                str(tuple(vector.shape)),
            )
    lower_replaced_modules(source, base, program)
    return program


METHOD = Method(
    name="IA3",
    summary="an input scale on feed-forward modules, an output scale elsewhere",
    fields={
        **COMMON_FIELDS,
        "modules_to_save": no_effect,
        # The vectors' shapes say on which side they act.
        "feedforward_modules": no_effect,
        "target_modules": no_effect,
        "exclude_modules": no_effect,
        "fan_in_fan_out": no_effect,
        "init_ia3_weights": only(True, False, None),
    },
    lower=lower,
)
