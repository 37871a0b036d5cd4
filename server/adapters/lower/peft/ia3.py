"""IA3 (Liu et al. 2022) as PEFT stores it: one vector a module, on its input where it is a feed-forward module, else on its output."""

from __future__ import annotations

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, no_effect, only
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS, Group, lower_groups
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """``(1, in)``: ``W (x * l) + b``; ``(out, 1)``: ``(W x + b) * l``, the bias included."""

    def lower_site(program: Program, group: Group) -> None:
        vector, spec = group["ia3_l"], group.spec
        if tuple(vector.shape) == (1, spec.in_features):
            program.linear(group.site).in_scale = vector[0]
        elif tuple(vector.shape) == (spec.out_features, 1):
            program.linear(group.site).out_scale = vector[:, 0]
        else:
            source.fault(
                "wrong_shape",
                f"{group.site}.ia3_l",
                "one number an input or an output is needed",
                f"(1, {spec.in_features}) or ({spec.out_features}, 1)",
                str(tuple(vector.shape)),
            )

    return lower_groups(source, base, "ia3_", {"ia3_l": ("rows", "columns")}, lower_site)


METHOD = Method(
    name="IA3",
    summary="an input scale on feed-forward modules, an output scale elsewhere",
    # The vectors' shapes say on which side they act.
    fields={**WRAPPED_FIELDS, "feedforward_modules": no_effect, "init_ia3_weights": only(True, False, None)},
    lower=lower,
)
