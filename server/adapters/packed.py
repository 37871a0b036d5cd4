"""Packed programs: every matrix and vector laid out so that admission to the bank is one copy each. Knows no file.

Every low-rank matrix lies in one flat tensor, ``rows``, and every vector in another, ``vectors``; so that making a program
resident is one contiguous copy each. On an fp32 base, matrices that bf16 holds exactly, such as those of adapters that were trained in it,
are laid out in bf16, which halves what loading them and computing with them reads. Offsets count elements. A matrix of width ``w`` starts
at a multiple of ``w``, so that in an arena of the same dtype whose programs start at multiples of ``alignment(spec)`` it can also be
read as rows ``arena.view(-1, w)[offset // w + i]``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from server.adapters.base_spec import BaseSpec
from server.adapters.flat import Flat, shortened
from server.adapters.ir import (
    VECTORS,
    BottleneckEdit,
    Edit,
    EmbedEdit,
    FusionEdit,
    HeadEdit,
    HeadLayer,
    InterventionEdit,
    LinearEdit,
    NormEdit,
    Placement,
    Pooling,
    Program,
    Prologue,
    SideEdit,
    TaskHead,
)

_MAX_ALIGNMENT = 1 << 20


@dataclass(frozen=True, slots=True)
class BottleneckLayout:
    """Where one bottleneck lies: ``down`` and ``up`` are offsets into ``rows`` of ``rank`` rows each, the others into ``vectors``."""

    placement: Placement
    rank: int
    down: int
    up: int
    down_bias: int | None = None
    up_bias: int | None = None
    before_weight: int | None = None
    before_bias: int | None = None
    after_weight: int | None = None
    after_bias: int | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class SiteLayout:
    """Where one site's edits lie. ``down``/``up`` are offsets into ``rows`` of ``rank`` rows each; the scales and ``shift`` are offsets into
    ``vectors``; ``extras`` maps the remaining tensors (``dense``, ``norm.weight``, ``embed.rows``, ``head.weight``, …) to tensor names, and
    ``flags`` what is no tensor (``fusion.placement``, ``side.projected``, …) to its value."""

    rank: int = 0
    down: int = 0
    up: int = 0
    in_scale: int | None = None
    out_scale: int | None = None
    shift: int | None = None
    pair_scale: int | None = None
    pair_group: int = 0
    bottlenecks: tuple[BottleneckLayout, ...] = ()
    extras: dict[str, str] = field(default_factory=dict)
    flags: dict[str, Any] = field(default_factory=dict)

    @property
    def kinds(self) -> set[str]:
        """The kinds of edits here, a linear's aside: ``bottleneck``, and the prefixes of extras (``norm``, ``side``, …)."""
        found = {name.partition(".")[0] for name in self.extras if "." in name}
        return found | ({"bottleneck"} if self.bottlenecks else set())


@dataclass(frozen=True, slots=True)
class PrologueLayout:
    """A prologue without its tensors, which are the extras ``prologue.kv`` and ``prologue.tokens``."""

    num_kv: int = 0
    num_tokens: int = 0
    tokens_site: str = ""
    shifts: bool = True
    after_first: bool = False

    def __len__(self) -> int:
        return self.num_kv + self.num_tokens

    @property
    def position_shift(self) -> int:
        """What is added to the positions of real tokens."""
        return len(self) if self.shifts else 0


@dataclass(frozen=True, slots=True)
class TaskHeadLayout:
    """A task head without its tensors, which are the extras ``task_head.N.weight`` and ``task_head.N.bias``."""

    pooling: Pooling
    activations: tuple[str, ...]
    labels: tuple[str, ...] = ()
    multi_label: bool = False


@dataclass(frozen=True, slots=True)
class PackedProgram:
    """A program as the engine holds it: ``rows`` in the base's dtype or, all of them exactly, in bf16 where that is fp32; ``vectors`` in
    fp32 (fp64 on an fp64 base)."""

    program_id: str
    layouts: dict[str, SiteLayout]
    rows: Tensor
    vectors: Tensor
    extras: dict[str, Tensor]
    invocation_tokens: tuple[int, ...] = ()
    prologue: PrologueLayout = PrologueLayout()
    head: TaskHeadLayout | None = None
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
    rows, vectors = Flat(), Flat()
    layouts: dict[str, SiteLayout] = {}
    extras: dict[str, Tensor] = {}
    shared: dict[tuple[int, torch.Size], str] = {}
    for site, edits in program.edits.items():
        found: dict[str, Any] = {"extras": {}, "flags": {}, "bottlenecks": ()}
        for edit in edits:
            if isinstance(edit, BottleneckEdit):
                found["bottlenecks"] += (_lay_bottleneck(edit, rows, vectors),)
                continue
            if isinstance(edit, LinearEdit):
                found |= _lay_linear(edit, rows, vectors)
            for name, tensor in _loose_fields(edit):
                # Rows that replace an embedding's and a tied head's are one tensor, here too.
                key = shared.setdefault((tensor.data_ptr(), tensor.shape), f"extra.{len(extras)}")
                found["extras"][name] = key
                extras[key] = tensor.contiguous()
            found["flags"] |= _flags(edit)
        layouts[site] = SiteLayout(**found)
    prologue, head = program.prologue, program.head
    for name in ("kv", "tokens"):
        if (tensor := getattr(prologue, name)) is not None:
            extras[f"prologue.{name}"] = tensor.contiguous()
    for index, layer in enumerate(head.layers if head else ()):
        extras[f"task_head.{index}.weight"] = layer.weight.contiguous()
        if layer.bias is not None:
            extras[f"task_head.{index}.bias"] = layer.bias.contiguous()
    return PackedProgram(
        program_id,
        layouts,
        shortened(rows.tensor()),
        vectors.tensor(),
        extras,
        program.invocation_tokens,
        PrologueLayout(prologue.num_kv, prologue.num_tokens, prologue.tokens_site, prologue.shifts, prologue.after_first),
        None
        if head is None
        else TaskHeadLayout(head.pooling, tuple(layer.activation for layer in head.layers), head.labels, head.multi_label),
        {**(facts or {}), **({"notes": program.notes} if program.notes else {})},
    )


def unpack_program(packed: PackedProgram, spec: BaseSpec) -> Program:
    """The program that ``pack_program`` was given; tensors are views of the packed ones, matrices that were packed in bf16 aside."""
    # The names of dtypes are PyTorch's.
    rows = packed.rows.to(getattr(torch, spec.dtype))
    program = Program(invocation_tokens=packed.invocation_tokens, notes=dict(packed.facts.get("notes", {})))
    sites = spec.by_name()

    def cut(flat: Tensor, offset: int | None, *shape: int) -> Tensor | None:
        return None if offset is None else flat[offset : offset + math.prod(shape)].view(*shape)

    for name, layout in packed.layouts.items():
        site = sites[name]
        for edit in _loose_edits(layout, packed.extras):
            program.add(name, edit)
        linear = {
            "down": cut(rows, layout.down if layout.rank else None, layout.rank, site.in_features),
            "up": cut(rows, layout.up if layout.rank else None, layout.rank, site.out_features),
            "in_scale": cut(packed.vectors, layout.in_scale, site.in_features),
            **{
                field_name: cut(packed.vectors, getattr(layout, field_name), site.out_features)
                for field_name in ("out_scale", "shift", "pair_scale")
            },
            **{key: packed.extras[layout.extras[key]] for key in _LINEAR_EXTRAS if key in layout.extras},
        }
        if any(tensor is not None for tensor in linear.values()):
            program.add(name, LinearEdit(**linear, pair_group=layout.pair_group))
        for item in layout.bottlenecks:
            width = spec.hidden_size
            program.add(
                name,
                BottleneckEdit(
                    placement=item.placement,
                    down=rows[item.down : item.down + item.rank * width].view(item.rank, width),
                    up=rows[item.up : item.up + item.rank * width].view(item.rank, width),
                    down_bias=cut(packed.vectors, item.down_bias, item.rank),
                    **{key: cut(packed.vectors, getattr(item, key), width) for key in _BOTTLENECK_VECTORS if key != "down_bias"},
                    weight=item.weight,
                ),
            )
    layout_of = packed.prologue
    program.prologue = Prologue(
        packed.extras.get("prologue.kv"),
        packed.extras.get("prologue.tokens"),
        layout_of.tokens_site,
        layout_of.shifts,
        layout_of.after_first,
    )
    if packed.head is not None:
        layers = [
            HeadLayer(packed.extras[f"task_head.{index}.weight"], packed.extras.get(f"task_head.{index}.bias"), activation)
            for index, activation in enumerate(packed.head.activations)
        ]
        program.head = TaskHead(packed.head.pooling, layers, packed.head.labels, packed.head.multi_label)
    return program


_LINEAR_EXTRAS = ("dense", "rotation", "left", "right")
_LINEAR_VECTORS = ("in_scale", "out_scale", "shift", "pair_scale")
_BOTTLENECK_VECTORS = ("down_bias", "up_bias", "before_weight", "before_bias", "after_weight", "after_bias")
_LOOSE_KINDS: dict[str, type] = {
    "norm": NormEdit,
    "embed": EmbedEdit,
    "head": HeadEdit,
    "fusion": FusionEdit,
    "side": SideEdit,
    "intervention": InterventionEdit,
}
assert {*_LINEAR_VECTORS, *_BOTTLENECK_VECTORS} == VECTORS


def _lay_linear(edit: LinearEdit, rows: Flat, vectors: Flat) -> dict[str, Any]:
    laid: dict[str, Any] = {}
    if edit.down is not None and edit.up is not None:
        laid |= {"rank": edit.rank, "down": rows.append(edit.down), "up": rows.append(edit.up)}
    for name in _LINEAR_VECTORS:
        if (value := getattr(edit, name)) is not None:
            laid[name] = vectors.append(value)
    return laid | {"pair_group": edit.pair_group}


def _lay_bottleneck(edit: BottleneckEdit, rows: Flat, vectors: Flat) -> BottleneckLayout:
    offsets = {name: vectors.append(value) for name in _BOTTLENECK_VECTORS if (value := getattr(edit, name)) is not None}
    return BottleneckLayout(
        edit.placement, edit.rank, rows.append(edit.down), rows.append(edit.up), weight=edit.weight, **offsets
    )


def _loose_fields(edit: Edit) -> Iterable[tuple[str, Tensor]]:
    """What is kept as a tensor of its own, as (name, tensor): everything but a linear's low rank, scales and shift."""
    if isinstance(edit, LinearEdit):
        return [(name, value) for name in _LINEAR_EXTRAS if (value := getattr(edit, name)) is not None]
    return [
        (f"{_prefix(edit)}.{item.name}", value) for item in fields(edit) if isinstance(value := getattr(edit, item.name), Tensor)
    ]


def _flags(edit: Edit) -> dict[str, Any]:
    """What a loose edit holds beside tensors."""
    if isinstance(edit, LinearEdit):
        return {}
    values = {item.name: getattr(edit, item.name) for item in fields(edit)}
    return {
        f"{_prefix(edit)}.{name}": asdict(value) if isinstance(value, Placement) else value
        for name, value in values.items()
        if value is not None and not isinstance(value, Tensor)
    }


def _loose_edits(layout: SiteLayout, extras: dict[str, Tensor]) -> Iterable[Edit]:
    values: dict[str, dict[str, Any]] = {}
    for key, value in {**{name: extras[tensor] for name, tensor in layout.extras.items()}, **layout.flags}.items():
        kind, dot, name = key.partition(".")
        if dot:
            values.setdefault(kind, {})[name] = value
    for kind, found in values.items():
        if "placement" in found:
            found["placement"] = Placement(**found["placement"])
        if kind == "intervention":
            found.setdefault("source_bias", None)
        yield _LOOSE_KINDS[kind](**found)


def _prefix(edit: Edit) -> str:
    return type(edit).__name__.removesuffix("Edit").lower()
