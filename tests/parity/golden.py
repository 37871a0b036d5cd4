"""The golden AdapterHub checkpoints of tests/golden: their files by role, and what the library computed with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from adapter_store.staging import ROLES
from server.adapters.ir import Program
from server.adapters.lower import Checkpoint
from server.adapters.lower.checkpoint import read_checkpoint
from server.adapters.program_file import write_program
from server.engine.types import ProgramRef

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Expected:
    """For one prompt: its ids, those that follow greedily, and the logits ``(n, vocab)`` at every position of both. For encoders the last
    hidden states ``(n, hidden)``, virtual tokens included, and what the head makes of them."""

    prompt: list[int]
    greedy: list[int]
    logits: Tensor | None = None
    hidden: Tensor | None = None
    scores: Tensor | None = None


def base_directory(family: str) -> Path:
    return GOLDEN / "bases" / family


def names(kind: str, family: str = "") -> list[str]:
    """The directories of ``cases`` or ``refused``, of one family or all."""
    return sorted(path.name for path in (GOLDEN / kind).iterdir() if path.name.startswith(family))


def golden_files(directory: Path) -> dict[str, Path]:
    """The files in a directory and of a fusion's children, by role."""
    files = {ROLES[path.name]: path for path in directory.iterdir() if path.name in ROLES}
    for child in sorted((directory / "children").glob("*")):
        files |= {f"child/{child.name}/{ROLES[path.name]}": path for path in child.iterdir() if path.name in ROLES}
    return files


def read_golden(directory: Path) -> Checkpoint:
    """The checkpoint in a directory, with its head and its children."""
    return read_checkpoint(golden_files(directory))


def write(program: Program, name: str, directory: Path) -> ProgramRef:
    """The program as a file in a directory."""
    path = directory / f"{name.replace('/', '-')}.safetensors"
    write_program(path, program, program_id=name, facts={})
    return ProgramRef(name, str(path))


def expected(name: str) -> list[Expected]:
    """What the library computed with a case."""
    found = load_file(GOLDEN / "cases" / name / "expected.safetensors")
    count = sum(key.startswith("prompt.") for key in found)
    return [
        Expected(
            found[f"prompt.{index}"].tolist(),
            found[f"greedy.{index}"].tolist() if f"greedy.{index}" in found else [],
            *(found.get(f"{kind}.{index}") for kind in ("logits", "hidden", "scores")),
        )
        for index in range(count)
    ]
