"""What a program is called. Standard library only, so that every process makes the same names."""

from __future__ import annotations

import hashlib

LOWERING_VERSION = 3
"""Bumped whenever lowering changes what a program holds; it is part of every program id."""

BASE_PROGRAM = "base"
"""The program id of the base model itself: no edits, slot 0."""

MAX_ADAPTERS, MAX_WEIGHT = 8, 10.0
"""How many adapters may be combined in one program, and how large a weight may be."""


def program_id(
    adapters: tuple[tuple[str, float], ...], base_digest: str, *, drop: int = 0, version: int = LOWERING_VERSION
) -> str:
    """The identity of everything that changes K/V: sha256 over (ordered (digest, weight), dropped layers, base digest, version)."""
    lines = [f"medley-program {version}", base_digest, f"drop {drop}"]
    text = "\n".join([*lines, *(f"{digest} {float(weight)!r}" for digest, weight in adapters)])
    return hashlib.sha256(text.encode()).hexdigest()
