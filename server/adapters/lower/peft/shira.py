"""SHiRA (Bhardwaj et al. 2024) as PEFT stores it: a sparse change of the weight, as values and their places."""

from __future__ import annotations

import torch

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, no_effect
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS, Group, lower_groups
from server.adapters.lower.source import Source

_VALUES, _PLACES = "shira_weight", "shira_indices"


def lower(source: Source, base: Base) -> Program:
    """``W[row, column] += value``; places that occur twice add up."""

    def lower_site(program: Program, group: Group) -> None:
        spec, places = group.spec, group[_PLACES]
        if group.sizes["n"] != group.sizes["places"]:
            message, expected = "every value needs its place; the checkpoint is incomplete", f"(2, {group.sizes['n']})"
            source.fault("missing_tensor", f"{group.site}.{_PLACES}", message, expected, str(tuple(places.shape)))
            return
        limits = torch.tensor([[spec.out_features], [spec.in_features]])
        if bool(((places < 0) | (places >= limits)).any()):
            expected = f"rows below {spec.out_features}, columns below {spec.in_features}"
            source.fault(
                "wrong_shape",
                f"{group.site}.{_PLACES}",
                "a place lies outside the weight; was the adapter trained on another base model?",
                expected,
            )
            return
        source.reserve(spec.out_features * spec.in_features)
        delta = torch.zeros(spec.out_features, spec.in_features, dtype=base.compute)
        program.linear(group.site).dense = delta.index_put_((places[0], places[1]), group[_VALUES], accumulate=True)

    shapes = {_VALUES: ("n",), _PLACES: (2, "places")}
    return lower_groups(source, base, "shira_", shapes, lower_site, integers=frozenset({_PLACES}))


METHOD = Method(
    name="SHIRA",
    summary="a sparse change of the weight, as a dense one",
    # The places are stored; these say how they were drawn.
    fields={**WRAPPED_FIELDS, **dict.fromkeys(("r", "mask_type", "random_seed"), no_effect)},
    lower=lower,
)
