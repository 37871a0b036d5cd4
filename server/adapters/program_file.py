"""The file that holds a program: safetensors, with the layout as JSON in its metadata. What is laid out is ``packed``'s business."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save_file

from server.adapters.ir import Placement, Program
from server.adapters.packed import BottleneckLayout, PackedProgram, PrologueLayout, SiteLayout, TaskHeadLayout, pack_program

_METADATA_KEY = "medley"


def write_program(path: Path, program: Program, *, program_id: str, facts: dict[str, Any]) -> None:
    """Write a program file: into a neighbour first, then renamed, so that a reader sees all of it or nothing.

    Raises ValueError for a program that no engine could run: one that starts with something and acts only later.
    """
    if program.invocation_tokens and len(program.prologue):
        raise ValueError(f"program {program_id} has a prologue and acts only from tokens of the prompt on")
    packed = pack_program(program, program_id=program_id, facts=facts)
    metadata = {
        name: _plain(getattr(packed, name))
        for name in ("program_id", "layouts", "invocation_tokens", "prologue", "head", "facts")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(
        {"rows": packed.rows, "vectors": packed.vectors, **packed.extras},
        temporary,
        metadata={_METADATA_KEY: json.dumps(metadata)},
    )
    os.replace(temporary, path)


def read_program(path: Path) -> PackedProgram:
    """Read a program file into memory of its own, so that no later use waits for the disk.

    Runs no tensor operation: called on a loader thread, one would start a second team of OpenMP threads, and with more threads than
    cores every parallel operation of the engine pays for waking its workers (measured: 80 µs each).
    """
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    metadata = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_METADATA_KEY])
    tensors = load(content)
    head = metadata["head"]
    return PackedProgram(
        program_id=metadata["program_id"],
        layouts={site: _read_layout(layout) for site, layout in metadata["layouts"].items()},
        rows=tensors.pop("rows"),
        vectors=tensors.pop("vectors"),
        extras=tensors,
        invocation_tokens=tuple(metadata["invocation_tokens"]),
        prologue=PrologueLayout(**metadata["prologue"]),
        head=head
        and TaskHeadLayout(**{**head, "activations": tuple(head["activations"]), "labels": tuple(head.get("labels", ()))}),
        facts=metadata["facts"],
    )


def _plain(value: Any) -> Any:
    """A value as JSON holds it; dataclasses become objects of the fields that differ from their defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        shown = {}
        for item in fields(value):
            held = getattr(value, item.name)
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            if default is MISSING or held != default:
                shown[item.name] = _plain(held)
        return shown
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _read_layout(data: dict[str, Any]) -> SiteLayout:
    items = [BottleneckLayout(**{**item, "placement": Placement(**item["placement"])}) for item in data.get("bottlenecks", ())]
    return SiteLayout(**{**data, "bottlenecks": tuple(items)})
