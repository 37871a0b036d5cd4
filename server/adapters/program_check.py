"""What a program from a file must be before an engine holds it: every place that its layout names lies within its own tensors.

Programs of all tenants lie in one arena, so that a wrong offset would read another's weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import get_args

from torch import Tensor

from server.adapters.base_spec import BaseSpec, SiteSpec
from server.adapters.ir import Stream
from server.adapters.packed import BottleneckLayout, PackedProgram, SiteLayout
from server.adapters.pairs import are_pairs

STREAMS = get_args(Stream)


def check_program(program: PackedProgram, spec: BaseSpec) -> None:
    """Raises ValueError for a program that is none for this base, with the first thing that is wrong."""
    _Check(program, spec).run()


class _Check:
    def __init__(self, program: PackedProgram, spec: BaseSpec) -> None:
        self._program = program
        self._spec = spec

    def run(self) -> None:
        program = self._program
        for name, flat in (("rows", program.rows), ("vectors", program.vectors)):
            if flat.dim() != 1 or not flat.is_floating_point():
                raise ValueError(f"{name} is {flat.dtype} of shape {tuple(flat.shape)}; it must be one row of floats")
        for token in program.invocation_tokens:
            _natural("an invocation token", token)
        sites = self._spec.by_name()
        for name, layout in program.layouts.items():
            if name not in sites:
                raise ValueError(f"the base has no site {name}")
            self._check_site(sites[name], layout)
        self._check_prologue()
        if program.head is not None:
            self._check_extras("the classifier", [f"task_head.{index}.weight" for index in range(len(program.head.activations))])

    def _check_site(self, site: SiteSpec, layout: SiteLayout) -> None:
        _natural(f"{site.name}: rank", layout.rank)
        _natural(f"{site.name}: pair_group", layout.pair_group)
        if layout.rank:
            self._check_rows(f"{site.name}: down", layout.down, layout.rank, site.in_features)
            self._check_rows(f"{site.name}: up", layout.up, layout.rank, site.out_features)
        self._check_vector(f"{site.name}: in_scale", layout.in_scale, site.in_features)
        for field in ("out_scale", "shift", "pair_scale"):
            self._check_vector(f"{site.name}: {field}", getattr(layout, field), site.out_features)
        if layout.pair_scale is not None and not are_pairs(site.out_features, layout.pair_group):
            raise ValueError(f"{site.name}: {site.out_features} outputs are not pairs in groups of {layout.pair_group}")
        if layout.bottlenecks and site.name not in {sublayer.site for sublayer in self._spec.sublayers}:
            raise ValueError(f"{site.name}: a bottleneck needs a site that ends a sub-layer")
        for item in layout.bottlenecks:
            self._check_bottleneck(site.name, item)
        self._check_extras(site.name, layout.extras.values())
        for field in ("norm.weight", "norm.bias"):
            if field in layout.extras:
                self._check_norm(f"{site.name}: {field}", self._program.extras[layout.extras[field]], site)

    def _check_bottleneck(self, site: str, item: BottleneckLayout) -> None:
        width = self._spec.hidden_size
        _natural(f"{site}: a bottleneck's rank", item.rank)
        for field in ("source", "residual"):
            if (found := getattr(item.placement, field)) not in STREAMS:
                raise ValueError(f"{site}: a bottleneck's {field} is {found!r}; it must be one of {', '.join(STREAMS)}")
        if type(item.weight) not in (int, float) or not math.isfinite(item.weight):
            raise ValueError(f"{site}: a bottleneck's weight is {item.weight!r}; it must be a finite number")
        for field in ("down", "up"):
            self._check_rows(f"{site}: a bottleneck's {field}", getattr(item, field), item.rank, width)
        self._check_vector(f"{site}: a bottleneck's down_bias", item.down_bias, item.rank)
        for field in ("up_bias", "before_weight", "before_bias", "after_weight", "after_bias"):
            self._check_vector(f"{site}: a bottleneck's {field}", getattr(item, field), width)

    def _check_norm(self, what: str, tensor: Tensor, site: SiteSpec) -> None:
        """Kernels read a norm's parameters by their address."""
        name = str(tensor.dtype).removeprefix("torch.")
        if site.kind != "norm" or tuple(tensor.shape) != (site.out_features,) or name != self._spec.dtype:
            raise ValueError(
                f"{what} is {name} of shape {tuple(tensor.shape)}; at a norm it must be {self._spec.dtype} of {site.out_features}"
            )

    def _check_prologue(self) -> None:
        prologue, spec = self._program.prologue, self._spec
        _natural("prologue: num_kv", prologue.num_kv)
        _natural("prologue: num_tokens", prologue.num_tokens)
        if prologue.num_kv:
            shape = (spec.num_layers, 2, spec.num_kv_heads, prologue.num_kv, spec.head_dim)
            self._check_shape("prologue.kv", shape)
        if prologue.num_tokens:
            self._check_shape("prologue.tokens", (prologue.num_tokens, spec.hidden_size))

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._program.extras.get(name)
        if found is None or tuple(found.shape) != shape:
            raise ValueError(f"{name} is {'missing' if found is None else tuple(found.shape)}; it must be {shape}")

    def _check_extras(self, owner: str, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._program.extras:
                raise ValueError(f"{owner}: there is no tensor {name}")

    def _check_rows(self, what: str, offset: int, rank: int, width: int) -> None:
        _within(what, offset, rank * width, self._program.rows)
        if offset % width:
            raise ValueError(f"{what} starts at element {offset}, which is no multiple of its width {width}")

    def _check_vector(self, what: str, offset: int | None, width: int) -> None:
        if offset is not None:
            _within(what, offset, width, self._program.vectors)


def _within(what: str, offset: int, length: int, flat: Tensor) -> None:
    _natural(what, offset)
    if offset + length > flat.numel():
        raise ValueError(f"{what} lies at elements {offset} to {offset + length} of {flat.numel()}")


def _natural(what: str, value: object) -> None:
    """A count or an offset, whatever a file says it is."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{what} is {value!r}; it must be a whole number, 0 or more")
