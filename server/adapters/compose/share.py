"""What one adapter of a composition has at one place: who it is, its weight, and the edit. Knows no kind of edit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from torch import Tensor

from server.adapters.ir import Edit

T = TypeVar("T")


class Conflict(Exception):
    """Adapters that cannot be added up exactly. The message says which and why."""


@dataclass(frozen=True, slots=True)
class Share(Generic[T]):
    """``index`` is the adapter's place in the request, by which people know it."""

    index: int
    weight: float
    edit: T


def shares_of(here: Sequence[Share[list[Edit]]], kind: type[T]) -> list[Share[T]]:
    """The shares that have an edit of a kind, with that edit; several of one adapter (rows and a whole table) count as one."""
    found: list[Share[T]] = []
    for share in here:
        edits: list[Any] = [edit for edit in share.edit if isinstance(edit, kind)]
        if edits:
            given = {item.name: getattr(edit, item.name) for edit in edits for item in fields(edit) if _is_set(edit, item.name)}
            found.append(Share(share.index, share.weight, edits[0] if len(edits) == 1 else kind(**given)))
    return found


def who(shares: Iterable[Share[Any]]) -> str:
    """``adapters[0] and adapters[2]``."""
    return " and ".join(f"adapters[{index}]" for index in sorted({share.index for share in shares}))


def weighted_sum(shares: Iterable[tuple[float, Tensor | None]]) -> Tensor | None:
    """``sum w * tensor`` over those that are there; None when none is."""
    total: Tensor | None = None
    for weight, tensor in shares:
        if tensor is not None:
            total = weight * tensor if total is None else total + weight * tensor
    return total


def _is_set(edit: Any, name: str) -> bool:
    return getattr(edit, name) is not None
