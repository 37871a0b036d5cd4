"""The choice among exact forms of one addition to a linear, by bytes. Knows the terms of ``ir.LinearEdit``, no method.

A form says its size before it is made, so that the large ones never are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import LinearEdit
from server.adapters.lower.source import Source


@dataclass(frozen=True, slots=True)
class Form:
    """One way to state the addition: how many numbers it holds, and the fields of the edit, made on demand."""

    size: int
    make: Callable[[], Mapping[str, Tensor]]


def low_rank(spec: SiteSpec, rank: int, make: Callable[[], tuple[Tensor, Tensor]]) -> Form:
    """``down (rank, in)`` and ``up (rank, out)``."""
    return Form(rank * (spec.in_features + spec.out_features), lambda: dict(zip(("down", "up"), make(), strict=True)))


def dense(spec: SiteSpec, make: Callable[[], Tensor]) -> Form:
    """``(out, in)``."""
    return Form(spec.in_features * spec.out_features, lambda: {"dense": make()})


def kronecker(left: Tensor, right: Tensor) -> Form:
    """``kron(left, right)``, never spelt out."""
    return Form(left.numel() + right.numel(), lambda: {"left": left, "right": right})


def product(down: Tensor, up: Tensor) -> tuple[Form, Form]:
    """Both forms of ``up.T @ down``: ``down (rank, in)`` and ``up (rank, out)`` as they are, or multiplied out."""
    return (
        Form(down.numel() + up.numel(), lambda: {"down": down, "up": up}),
        Form(down.shape[1] * up.shape[1], lambda: {"dense": up.T @ down}),
    )


def set_cheapest(source: Source, edit: LinearEdit, forms: Sequence[Form]) -> None:
    """Give the edit the smallest of the forms; of equal ones the first. Raises LoweringError when even that is over the byte budget."""
    form = min(forms, key=lambda form: form.size)
    source.reserve(form.size)
    for name, tensor in form.make().items():
        setattr(edit, name, tensor)
