"""Supertuning as PEFT stores it: numbers added to single weights, by their positions in W flattened; with ``r`` a low-rank pair as well."""

from __future__ import annotations

from typing import Any

import torch

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, integer, no_effect, number, optional
from server.adapters.lower.peft.wrapped import MAX_RANK, WRAPPED_FIELDS, tensor_groups, with_saved_modules
from server.adapters.lower.source import Source

_VALUES, _INDICES = "supertuning_values", "supertuning_indices"
_FIRST, _SECOND = "supertuning_lora_A.weight", "supertuning_lora_B.weight"


def lower(source: Source, base: Base) -> Program:
    """A dense difference, and low rank ``B A * alpha / r``."""
    program = Program()
    rank, alpha = source.config.get("r"), source.config.get("lora_alpha")
    shapes: dict[str, tuple[str | int, ...]] = {_VALUES: ("n",), _INDICES: ("n",)}
    if rank is not None:
        shapes |= {_FIRST: (rank, "in"), _SECOND: ("out", rank)}
        if alpha is None:
            source.field_fault("lora_alpha", "a low-rank pair needs its scale", "a number")
            return program
    for group in tensor_groups(source, base, "supertuning_", shapes, integers=frozenset({_INDICES})):
        size_in, size_out = group.spec.in_features, group.spec.out_features
        places = group[_INDICES]
        if int(places.min()) < 0 or int(places.max()) >= size_in * size_out:
            source.fault(
                "wrong_shape",
                f"{group.site}.{_INDICES}",
                "a position is outside the weight; was the adapter trained on another base model?",
                str(size_in * size_out),
            )
            continue
        source.reserve(size_in * size_out)
        edit = program.linear(group.site)
        flat = torch.zeros(size_in * size_out, dtype=base.compute).index_add_(0, places, group[_VALUES])
        edit.dense = flat.view(size_out, size_in)
        if rank is not None and alpha is not None:
            edit.down, edit.up = group[_FIRST], (group[_SECOND] * (alpha / rank)).T
    return with_saved_modules(source, base, program)


def _stored(value: Any) -> str | None:
    """Without stored positions they are those of the largest weights, in an order that equal weights make a matter of chance."""
    return (
        None if value is True else "true: save the positions in the checkpoint (their order cannot be found again with certainty)"
    )


METHOD = Method(
    name="SUPERTUNING",
    summary="a dense difference from single weights, and low rank",
    fields={
        **WRAPPED_FIELDS,
        "r": optional(integer(1, MAX_RANK)),
        "lora_alpha": optional(number(-1e6, 1e6)),
        "save_precomputed_indices": _stored,
        # Which weights were chosen is stored.
        "sparsity": no_effect,
        "select_top": no_effect,
        "lora_dropout": no_effect,
    },
    lower=lower,
)
