"""The file that holds a program: safetensors, with the layout as JSON in its metadata. What is laid out is ``packed``'s business."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from server.adapters.ir import Placement, Program
from server.adapters.packed import BottleneckLayout, PackedProgram, PrologueLayout, SiteLayout, TaskHeadLayout, pack_program

_METADATA_KEY = "medley"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the names that safetensors files have for them."""


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


def read_program(path: Path, *, pin_memory: bool = False) -> PackedProgram:
    """Read a program file into memory of its own, so that no later use waits for the disk. ``pin_memory``: where a device copies from.

    The tensors are views of one buffer that has the whole file: nothing is copied twice. Runs no tensor operation: called on a loader
    thread, one would start a second team of OpenMP threads, and with more threads than cores every parallel operation of the engine pays
    for waking its workers (measured: 80 µs each). Raises OSError, or ValueError for a file that is not whole and well-formed. What the
    header says of the tensors is not checked here: see ``program_check``.
    """
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pin_memory)
        _fill(file, buffer.numpy().data)
    try:
        header, tensors = _views(buffer)
        metadata = json.loads(header["__metadata__"][_METADATA_KEY])
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
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"the program file's header is malformed: {type(error).__name__} {error}") from error


def _fill(file: io.FileIO, buffer: memoryview) -> None:
    """Read as much as the buffer holds. Raises ValueError for a file that became shorter meanwhile."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            raise ValueError(f"the program file ends after {done} of {len(buffer)} bytes")
        done += count


def _views(buffer: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header of a safetensors file, and its tensors as views. Raises ValueError unless they cover all that follows it, one by one."""
    content = buffer.numpy().data
    if len(content) < 8:
        raise ValueError(f"the program file has {len(content)} bytes, which is no header")
    start = 8 + int.from_bytes(content[:8], "little")
    if start > len(content) or start % 8:
        raise ValueError(f"the program file has {len(content)} bytes and its header claims to end at {start}")
    header = json.loads(bytes(content[8:start]))
    found = {name: entry for name, entry in header.items() if name != "__metadata__"}
    tensors, end = {}, 0
    for name, entry in sorted(found.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape, (first, last) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if first != end or last - first != math.prod(shape) * dtype.itemsize or (start + first) % dtype.itemsize:
            raise ValueError(
                f"tensor {name} of {entry['dtype']} {shape} does not lie at bytes {first} to {last}, behind byte {end}"
            )
        if last > len(content) - start:
            raise ValueError(f"tensor {name} ends at byte {last} of {len(content) - start}")
        tensors[name] = buffer[start + first : start + last].view(dtype).view(shape)
        end = last
    if end != len(content) - start:
        raise ValueError(f"the program file has {len(content) - start} bytes of tensors and its header speaks of {end}")
    return header, tensors


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
