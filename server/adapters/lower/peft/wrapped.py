"""What PEFT methods that wrap linears share: their config fields, a site's tensors as one group, and what is saved beside them.

Knows shapes by the letters that method files write them in; no method's maths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from server.adapters.base_spec import SiteKind, SiteSpec
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import COMMON_FIELDS, Rule, integer, no_effect, number
from server.adapters.lower.peft.replaced import lower_biases, lower_replaced_modules
from server.adapters.lower.source import Source

Shapes = Mapping[str, tuple[str | int, ...]]
"""What a group holds: the end of each key → its shape. ``in`` and ``out`` are the site's; any other letter is one size for the whole group,
``r`` its rank."""
LINEARS: tuple[SiteKind, ...] = ("linear", "head")
MAX_RANK = 65536
"""For config fields. What is really made is bounded by ``Source.reserve``."""


def biases(value: Any) -> str | None:
    """PEFT's ``bias``: the keys of saved biases say whose they are."""
    fits = value in ("none", "all") or (isinstance(value, str) and value.endswith("_only"))
    return None if fits else "none, all, or the method's name with _only"


WRAPPED_FIELDS: dict[str, Rule] = {
    **COMMON_FIELDS,
    # The tensors' own keys say where they belong, and Base turns stored weights the right way.
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"), no_effect),
    "fan_in_fan_out": no_effect,
    "bias": biases,
    # How training began.
    "init_weights": no_effect,
}


@dataclass(frozen=True, slots=True)
class Group:
    """The tensors of one site by the ends of their keys, in the accumulation dtype, and the size that each letter stands for."""

    spec: SiteSpec
    tensors: Mapping[str, Tensor]
    sizes: Mapping[str, int]

    def __getitem__(self, tail: str) -> Tensor:
        return self.tensors[tail]

    @property
    def site(self) -> str:
        return self.spec.name


def tensor_groups(
    source: Source,
    base: Base,
    prefix: str,
    shapes: Shapes | Callable[[SiteSpec], Shapes],
    *,
    integers: frozenset[str] = frozenset(),
    kinds: tuple[SiteKind, ...] = LINEARS,
    may_be_empty: bool = False,
) -> Iterator[Group]:
    """The group of every site that has a tensor whose key ends with ``prefix…``, in the base's order.

    ``integers`` are tensors of integers. Empty tensors are refused unless they ``may_be_empty``. A site whose group is incomplete, does
    not fit, or stands at a module of another kind is a fault and is left out.
    """
    for spec in source.sites(prefix, kinds):
        wanted = shapes(spec) if callable(shapes) else shapes
        group = _take(source, base, spec, wanted, integers, may_be_empty)
        if group is not None:
            yield group


def lower_groups(
    source: Source,
    base: Base,
    prefix: str,
    shapes: Shapes | Callable[[SiteSpec], Shapes],
    lower_site: Callable[[Program, Group], None],
    *,
    integers: frozenset[str] = frozenset(),
    kinds: tuple[SiteKind, ...] = LINEARS,
    may_be_empty: bool = False,
) -> Program:
    """A whole checkpoint of a method that treats each site by itself: ``lower_site`` for every group, then biases and replaced modules."""
    program = Program()
    for group in tensor_groups(source, base, prefix, shapes, integers=integers, kinds=kinds, may_be_empty=may_be_empty):
        lower_site(program, group)
    return with_saved_modules(source, base, program)


def with_saved_modules(source: Source, base: Base, program: Program) -> Program:
    """The program with what PEFT saves beside any method's own tensors: biases and ``modules_to_save``."""
    lower_biases(source, base, program)
    lower_replaced_modules(source, base, program)
    return program


def shared_tensor(source: Source, name: str, shape: tuple[int | None, ...], *, integers: bool = False) -> Tensor | None:
    """A tensor of the method itself, which belongs to no site. When it is missing, or does not fit, a fault and None."""
    if name not in source.shared:
        source.fault(
            "missing_tensor",
            f"base_model.{name}",
            "the checkpoint is incomplete without this tensor; save the adapter again",
            str(shape),
        )
    return source.take_shared(name, shape, integers=integers)


def fills_module(source: Source, group: Group, rows: int, columns: int) -> bool:
    """Whether blocks add up to the module's ``(out, in)``; a fault when they do not."""
    expected = (group.spec.out_features, group.spec.in_features)
    if (rows, columns) != expected:
        message = "the blocks do not add up to the module; was the adapter trained on another base model?"
        source.fault("wrong_shape", group.site, message, str(expected), str((rows, columns)))
    return (rows, columns) == expected


def module_rank(source: Source, site: str, default: int, stored: int | None = None) -> int | None:
    """``r`` of one module after ``rank_pattern``; a fault and None when it is no rank, or not the ``stored`` one that a scale divides by."""
    rank = source.pattern("rank_pattern", site, source.config.get("r", default))
    if integer(1, MAX_RANK)(rank) is not None or (stored is not None and rank != stored):
        source.fault(
            "wrong_rank",
            site,
            "the tensors and the config (r, rank_pattern) disagree on the rank",
            str(rank)[:40],
            None if stored is None else str(stored),
        )
        return None
    return int(rank)


def module_alpha(source: Source, site: str, default: float, *, field: str = "alpha") -> float:
    """``alpha`` of one module after ``alpha_pattern``, ``field`` where that says nothing; a fault and 0 when it is no number."""
    alpha = source.pattern("alpha_pattern", site, source.config.get(field, default))
    if number(-1e6, 1e6)(alpha) is not None:
        source.field_fault("alpha_pattern", "alpha must be a finite number")
        return 0.0
    return float(alpha)


def _take(
    source: Source, base: Base, spec: SiteSpec, shapes: Shapes, integers: frozenset[str], may_be_empty: bool
) -> Group | None:
    sizes = {"in": spec.in_features, "out": spec.out_features}
    found: dict[str, Tensor] = {}
    for tail, shape in shapes.items():
        where = f"{spec.name}.{tail}"
        if not source.has(spec.name, tail):
            source.fault(
                "missing_tensor", where, "a tensor of the group is missing; the checkpoint is incomplete, save the adapter again"
            )
            continue
        tensor = source.take(spec.name, tail, (None,) * len(shape), integers=tail in integers)
        if tensor is None:
            continue
        misfits = _misfits(tensor, shape, sizes)
        if misfits or not (tensor.numel() or may_be_empty):
            expected = ", ".join(f"{size}={sizes[size]}" if size in sizes else str(size) for size in map(str, shape))
            code, message = "wrong_shape", "the tensor does not fit the base model, or the others of its group"
            if misfits == {"r"}:
                code, message = "wrong_rank", "the tensor's rank r is not that of the others of its group"
            source.fault(code, where, message, f"({expected})", str(tuple(tensor.shape)))
            continue
        found[tail] = tensor if tail in integers else tensor.to(base.compute)
    return Group(spec, found, sizes) if len(found) == len(shapes) else None


def _misfits(tensor: Tensor, shape: tuple[str | int, ...], sizes: dict[str, int]) -> set[str | int]:
    """What a tensor does not fit of a shape. When it fits, letters met for the first time take their sizes from it, in ``sizes``."""
    known = dict(sizes)
    misfits = {
        size
        for size, actual in zip(shape, tensor.shape, strict=True)
        if (known.setdefault(size, actual) if isinstance(size, str) else size) != actual
    }
    if not misfits:
        sizes.update(known)
    return misfits
