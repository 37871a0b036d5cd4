"""Packed programs and the file that holds one: a safetensors file that the engine maps and copies.

Everything low-rank lies in one flat tensor, ``rows``, and every scale and shift in another, ``vectors``; so that making a program
resident is one contiguous copy each. Offsets count elements. A matrix of width ``w`` starts at a multiple of ``w``, so that in an
arena whose programs start at multiples of ``alignment(spec)`` it can also be read as rows ``arena.view(-1, w)[offset // w + i]``.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from server.adapters.base_spec import BaseSpec
from server.adapters.ir import Edit, LinearEdit, Program

_METADATA_KEY = "medley"
_MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True, slots=True)
class SiteLayout:
    """Where one site's edits lie. ``down``/``up`` are offsets into ``rows`` of ``rank`` rows each; ``in_scale``, ``out_scale`` and
    ``shift`` are offsets into ``vectors``; ``extras`` maps the remaining fields (``dense``, ``norm.weight``, ``embed.rows``,
    ``head.weight``, …) to tensor names."""

    rank: int = 0
    down: int = 0
    up: int = 0
    in_scale: int | None = None
    out_scale: int | None = None
    shift: int | None = None
    extras: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PackedProgram:
    """A program as the engine holds it: ``rows`` in the base's dtype, ``vectors`` in fp32 (fp64 on an fp64 base)."""

    program_id: str
    layouts: dict[str, SiteLayout]
    rows: Tensor
    vectors: Tensor
    extras: dict[str, Tensor]
    invocation_tokens: tuple[int, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.rows, self.vectors, *self.extras.values()))


def alignment(spec: BaseSpec) -> int:
    """Where programs may start in an arena: a common multiple of the widths of the base's linears.

    Widths that would make it absurd (a vocabulary) are left out; edits of such a width are read by slices, not as rows.
    """
    unit = 1
    for width in sorted({size for site in spec.sites if site.kind == "linear" for size in (site.in_features, site.out_features)}):
        if math.lcm(unit, width) <= _MAX_ALIGNMENT:
            unit = math.lcm(unit, width)
    return unit


def pack_program(program: Program, *, program_id: str, facts: dict[str, Any] | None = None) -> PackedProgram:
    """Lay a program's tensors out for the bank."""
    rows, vectors = _Flat(), _Flat()
    layouts: dict[str, SiteLayout] = {}
    extras: dict[str, Tensor] = {}
    shared: dict[tuple[int, torch.Size], str] = {}
    for site, edits in program.edits.items():
        fields: dict[str, Any] = {"extras": {}}
        for edit in edits:
            if isinstance(edit, LinearEdit):
                if edit.down is not None and edit.up is not None:
                    fields |= {"rank": edit.rank, "down": rows.append(edit.down), "up": rows.append(edit.up)}
                for name in ("in_scale", "out_scale", "shift"):
                    value = getattr(edit, name)
                    if value is not None:
                        fields[name] = vectors.append(value)
            for name, tensor in _loose_fields(edit):
                # Rows that replace an embedding's and a tied head's are one tensor, here too.
                key = shared.setdefault((tensor.data_ptr(), tensor.shape), f"extra.{len(extras)}")
                fields["extras"][name] = key
                extras[key] = tensor.contiguous()
        layouts[site] = SiteLayout(**fields)
    return PackedProgram(
        program_id, layouts, rows.tensor(), vectors.tensor(), extras, program.invocation_tokens, dict(facts or {})
    )


def write_program(path: Path, program: Program, *, program_id: str, facts: dict[str, Any]) -> None:
    """Write a program file: into a neighbour first, then renamed, so that a reader sees all of it or nothing."""
    packed = pack_program(program, program_id=program_id, facts=facts)
    metadata = {
        "program_id": packed.program_id,
        "layouts": {site: asdict(layout) for site, layout in packed.layouts.items()},
        "invocation_tokens": packed.invocation_tokens,
        "facts": packed.facts,
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
    return PackedProgram(
        program_id=metadata["program_id"],
        layouts={site: SiteLayout(**layout) for site, layout in metadata["layouts"].items()},
        rows=tensors.pop("rows"),
        vectors=tensors.pop("vectors"),
        extras=tensors,
        invocation_tokens=tuple(metadata["invocation_tokens"]),
        facts=metadata["facts"],
    )


def _loose_fields(edit: Edit) -> Iterable[tuple[str, Tensor]]:
    """What is kept as a tensor of its own, as (name, tensor): everything but a linear's low rank, scales and shift."""
    if isinstance(edit, LinearEdit):
        return [] if edit.dense is None else [("dense", edit.dense)]
    prefix = type(edit).__name__.removesuffix("Edit").lower()
    names = [name for name in type(edit).__slots__ if getattr(edit, name) is not None]
    return [(f"{prefix}.{name}", getattr(edit, name)) for name in names]


class _Flat:
    """Matrices appended into one flat tensor, each at a multiple of its own width."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._length = 0

    def append(self, tensor: Tensor) -> int:
        padding = -self._length % tensor.shape[-1]
        if padding:
            self._parts.append(tensor.new_zeros(padding))
        offset = self._length + padding
        self._parts.append(tensor.reshape(-1))
        self._length = offset + tensor.numel()
        return offset

    def tensor(self) -> Tensor:
        return torch.cat(self._parts) if self._parts else torch.zeros(0)
