"""The golden AdapterHub checkpoints of tests/golden: their files by role, and what the library computed with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from adapter_store.staging import ROLES
from server.adapters.lower import Checkpoint, lower
from server.adapters.lower.base import Base
from server.adapters.lower.checkpoint import read_checkpoint
from server.adapters.program_file import write_program
from server.engine.types import ProgramRef

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Expected:
    """For one prompt: its ids, those that follow greedily, and the logits ``(n, vocab)`` at every position of both."""

    prompt: list[int]
    greedy: list[int]
    logits: Tensor


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


def lower_golden(directory: Path, base: Base, target: Path) -> ProgramRef:
    """Lower a golden checkpoint into a program file in ``target``."""
    path = target / f"{directory.name}.safetensors"
    write_program(path, lower(read_golden(directory), base), program_id=directory.name, facts={})
    return ProgramRef(directory.name, str(path))


def expected(directory: Path) -> list[Expected]:
    found = load_file(directory / "expected.safetensors")
    count = sum(name.startswith("prompt.") for name in found)
    return [
        Expected(found[f"prompt.{index}"].tolist(), found[f"greedy.{index}"].tolist(), found[f"logits.{index}"])
        for index in range(count)
    ]
