"""Bone (Kang et al. 2024), which later PEFT versions call MiSS: the same blocks under their former name."""

from __future__ import annotations

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, integer, only
from server.adapters.lower.peft.miss import lower_blocks
from server.adapters.lower.peft.wrapped import MAX_RANK, WRAPPED_FIELDS
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    return lower_blocks(source, base, "bone_block")


METHOD = Method(
    name="BONE",
    summary="as MISS, its later name",
    fields={**WRAPPED_FIELDS, "r": integer(1, MAX_RANK), "init_weights": only(True, False, None, "bat")},
    lower=lower,
)
