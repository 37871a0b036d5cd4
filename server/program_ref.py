"""A lowered program, as the engine is told of it."""

from __future__ import annotations

from server.adapters.lowerer import LoweredProgram
from server.engine.types import ProgramRef


def program_ref(program: LoweredProgram) -> ProgramRef:
    """Its id, its file, and how much of the model's length its pseudo-tokens take."""
    return ProgramRef(program.program_id, str(program.path), program.facts.get("room_taken", 0))
