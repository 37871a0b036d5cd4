"""Which adapters a request asks for, in whatever schema. Knows no store and no program."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Selection:
    """One adapter, or the base model, by ``name``; or several by ``adapters``: (name, weight).

    ``drop``: the first so many layers go without their edits. ``user``: who asks, by which an alias always means the same to them.
    """

    name: str | None = None
    adapters: tuple[tuple[str, float], ...] = ()
    drop: int = 0
    user: str | None = None
