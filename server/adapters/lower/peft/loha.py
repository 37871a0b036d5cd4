"""LoHa (Hyeon-Woo et al. 2022, FedPara) as PEFT stores it: ``Δ = (w1_a w1_b) * (w2_a w2_b) * alpha / r``, the products elementwise.

The elementwise product of two rank-``r`` matrices has rank ``r²``: its factors are row-wise Khatri-Rao products.
"""

from __future__ import annotations

from torch import Tensor

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.cheapest import dense, low_rank, set_cheapest
from server.adapters.lower.method import Method, integer, no_effect, number
from server.adapters.lower.peft.wrapped import MAX_RANK, WRAPPED_FIELDS, Group, lower_groups, module_alpha, module_rank
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """Low rank ``r²`` or dense, whichever is smaller."""

    def lower_site(program: Program, group: Group) -> None:
        spec, rank = group.spec, group.sizes["r"]
        alpha = module_alpha(source, group.site, 8)
        if module_rank(source, group.site, 8, rank) is None:
            return
        first, second = (group[f"hada_w{index}_a"].T for index in (1, 2))
        third, fourth = (group[f"hada_w{index}_b"] for index in (1, 2))
        scale = alpha / rank
        forms = (
            low_rank(spec, rank * rank, lambda: (_khatri_rao(third, fourth), _khatri_rao(first, second) * scale)),
            dense(spec, lambda: (first.T @ third) * (second.T @ fourth) * scale),
        )
        set_cheapest(source, program.linear(group.site), forms)

    shapes = {"hada_w1_a": ("out", "r"), "hada_w1_b": ("r", "in"), "hada_w2_a": ("out", "r"), "hada_w2_b": ("r", "in")}
    return lower_groups(source, base, "hada_", shapes, lower_site)


def _khatri_rao(first: Tensor, second: Tensor) -> Tensor:
    """``(r, n)`` and ``(r, n)`` → ``(r², n)``: every row of one times every row of the other."""
    return (first[:, None] * second[None]).flatten(0, 1)


LYCORIS_FIELDS = {
    **WRAPPED_FIELDS,
    "r": integer(1, MAX_RANK),
    "alpha": number(-1e6, 1e6),
    # Checked where they are used, module by module.
    "rank_pattern": no_effect,
    "alpha_pattern": no_effect,
    "rank_dropout": no_effect,
    "module_dropout": no_effect,
    # Of convolutions, which these bases have none of.
    "use_effective_conv2d": no_effect,
}

METHOD = Method(
    name="LOHA", summary="low rank r² or a dense difference, whichever is smaller", fields=LYCORIS_FIELDS, lower=lower
)
