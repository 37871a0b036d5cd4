"""Programs: the one normal form that every adapter is lowered to, whatever its method.

A program is a set of edits on named sites of the base model, what a sequence starts with, and what is read off its last hidden
states. This module knows tensors and shapes; it knows no checkpoint format, no file and no method. See docs/ARCHITECTURE.md, "Programs".

Orientation: a linear maps ``x (…, in)`` to ``y (…, out)``; ``down`` is ``(rank, in)`` and ``up`` is ``(rank, out)``, so
the rank-``r`` term is ``(x @ down.T) @ up``. Scaling is already folded into ``up``. Tensors have the base's dtype, except those named in
``VECTORS``, which are at least fp32, and index tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Literal, TypeVar

import torch
from torch import Tensor

VECTORS = frozenset(
    {
        "in_scale",
        "out_scale",
        "shift",
        "pair_scale",
        "down_bias",
        "up_bias",
        "before_weight",
        "before_bias",
        "after_weight",
        "after_bias",
    }
)
"""Fields that hold one number a channel: kept at least in fp32, laid out apart from matrices."""


@dataclass(slots=True)
class LinearEdit:
    """What a program does at a linear ``base``; absent terms are None.

    With ``z = base(rotate(in_scale * x))``:
    ``y = out_scale * z + pair_scale * swap(z) + (x @ down.T) @ up + shift + x @ dense.T + kron(left, right) x``.

    ``in_scale (in,)``, ``out_scale``, ``pair_scale`` and ``shift (out,)``; the scales multiply the base's output including its bias.
    ``rotation (blocks, b, b)`` multiplies each block of ``b`` inputs from the right; one block stands for all. ``swap`` maps
    ``(z1, z2)``, the halves of every group of ``pair_group`` outputs, to ``(-z2, z1)``. ``dense (out, in)``. ``left (a, b)`` and
    ``right (c, d)`` with ``a * c = out`` and ``b * d = in`` are a Kronecker product that is never spelt out.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    in_scale: Tensor | None = None
    out_scale: Tensor | None = None
    shift: Tensor | None = None
    dense: Tensor | None = None
    rotation: Tensor | None = None
    pair_scale: Tensor | None = None
    pair_group: int = 0
    left: Tensor | None = None
    right: Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.down is None else int(self.down.shape[0])


@dataclass(slots=True)
class NormEdit:
    """Replaced norm parameters ``(hidden,)``, never ratios. ``bias`` only where the norm has one."""

    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(slots=True)
class EmbedEdit:
    """``y = out_scale * (E[id] + down[id] @ up)``; then ``rows`` replace the result for ``row_ids``.

    ``down (vocab, rank)``, ``up (rank, dim)``, ``out_scale (dim,)`` fp32, ``row_ids (n,)`` int64 ascending,
    ``rows (n, dim)``. A whole replaced table is ``table (vocab, dim)``, used instead of E.
    Everything is stated before the module's own embedding scale (Gemma), which is applied to the sum.
    """

    down: Tensor | None = None
    up: Tensor | None = None
    out_scale: Tensor | None = None
    row_ids: Tensor | None = None
    rows: Tensor | None = None
    table: Tensor | None = None


@dataclass(slots=True)
class HeadEdit:
    """A replaced output head: ``weight (vocab, hidden)`` instead of the base's, or ``rows`` of it for ``row_ids``.

    Low-rank terms on the head are a LinearEdit on the same site and are added to this result.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    row_ids: Tensor | None = None
    rows: Tensor | None = None


Stream = Literal["sublayer", "residual", "sum", "normed"]
"""A vector at a sub-layer's output: ``sublayer`` s is the output itself (after its own projection), ``residual`` r what will be added to it,
``sum`` s + r, ``normed`` the norm that follows the addition, of s + r (post-norm bases only)."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How a bottleneck joins the sub-layer it sits at. With ``u = up(act(down(before(source))))``:

    ``t = after(u + residual)``, or with ``norm_first`` ``t = after(u) + residual``; ``after`` and ``before`` are norms, if there are any.
    ``t`` then stands for the sub-layer's output s, to which the base adds r (and, post-norm, applies its norm). With ``replaces``
    it stands for all of that: neither r nor the norm is applied any more.
    """

    activation: str = "relu"
    source: Stream = "sublayer"
    residual: Stream = "sublayer"
    norm_first: bool = False
    replaces: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the bottleneck is just an addition to s: then edits add up."""
        return self.residual == "sublayer" and not self.replaces


@dataclass(slots=True)
class BottleneckEdit:
    """A small network at a sub-layer's output (a site of ``BaseSpec.sublayers``); scaling is folded into ``up`` and ``up_bias``.

    ``down (rank, hidden)``, ``down_bias (rank,)``, ``up (rank, hidden)``, ``up_bias (hidden,)``. ``before_*`` and ``after_*`` ``(hidden,)``
    are layer norms with eps 1e-5. ``weight``: the edit counts as ``s + weight * (t - s)``.
    """

    placement: Placement
    down: Tensor
    up: Tensor
    down_bias: Tensor | None = None
    up_bias: Tensor | None = None
    before_weight: Tensor | None = None
    before_bias: Tensor | None = None
    after_weight: Tensor | None = None
    after_bias: Tensor | None = None
    weight: float = 1.0

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


@dataclass(slots=True)
class FusionEdit:
    """Attention over the outputs ``u_i`` of the site's bottlenecks, in place of adding them up: ``t = sum_i a_i value(u_i) + residual`` with
    ``a = softmax_i(query(source) . key(u_i))``. ``query``, ``key``, ``value (hidden, hidden)`` in nn.Linear orientation; None is the identity.

    ``placement``'s source is the query's; its activation says nothing.
    """

    placement: Placement
    query: Tensor | None = None
    query_bias: Tensor | None = None
    key: Tensor | None = None
    key_bias: Tensor | None = None
    value: Tensor | None = None
    after_weight: Tensor | None = None
    after_bias: Tensor | None = None


@dataclass(slots=True)
class SideEdit:
    """Attention of the layer's rotated queries over keys and values of the program's own, added to the attention's output.

    ``key``, ``value (length, kv_heads, head_dim)``; the gate is folded into ``value``. ``projected``: what is added passes the layer's
    output projection; otherwise it is added after it. The site is the attention module.
    """

    key: Tensor
    value: Tensor
    projected: bool = True


@dataclass(slots=True)
class InterventionEdit:
    """``y + (act(y @ source.T + source_bias) - y @ project.T) @ project`` at a layer's output, for the first ``positions`` tokens of a
    sequence; virtual tokens are not among them.

    ``source (rank, hidden)``, ``source_bias (rank,)``, ``project (rank, hidden)``; without ``subtracts`` the projection is not subtracted.
    The site is the layer.
    """

    source: Tensor
    source_bias: Tensor | None
    project: Tensor
    activation: str = "linear"
    subtracts: bool = True
    positions: int = 0


Edit = LinearEdit | NormEdit | EmbedEdit | HeadEdit | BottleneckEdit | FusionEdit | SideEdit | InterventionEdit
E = TypeVar("E", LinearEdit, EmbedEdit)


@dataclass(slots=True)
class Prologue:
    """What every sequence of the program starts with, in front of its first token.

    ``kv (layers, 2, kv_heads, length, head_dim)``: keys and values as they lie in the cache, never rotated again.
    ``tokens (length, hidden)``: virtual tokens, computed like any others from these embeddings; ``tokens_site`` is the site whose output
    they replace (the embedding, or the norm after it). kv comes before tokens. ``shifts``: whether the positions of what follows are
    shifted by the length; without it real tokens start at position 0. ``after_first``: virtual tokens stand after the first real token.
    """

    kv: Tensor | None = None
    tokens: Tensor | None = None
    tokens_site: str = ""
    shifts: bool = True
    after_first: bool = False

    @property
    def num_kv(self) -> int:
        return 0 if self.kv is None else int(self.kv.shape[3])

    @property
    def num_tokens(self) -> int:
        return 0 if self.tokens is None else int(self.tokens.shape[0])

    def __len__(self) -> int:
        return self.num_kv + self.num_tokens


Pooling = Literal["first", "last", "mean", "none"]


@dataclass(slots=True)
class HeadLayer:
    """``act(x @ weight.T + bias)``: ``weight (out, in)``, ``bias (out,)``; ``activation`` "linear" is none."""

    weight: Tensor
    bias: Tensor | None = None
    activation: str = "linear"


@dataclass(slots=True)
class TaskHead:
    """A classifier over the backbone's last hidden states: ``layers`` on one pooled row, or with pooling "none" on every token's.

    ``labels`` names the last layer's outputs. ``first`` counts virtual tokens, as the reference libraries do.
    """

    pooling: Pooling
    layers: list[HeadLayer]
    labels: tuple[str, ...] = ()
    multi_label: bool = False


@dataclass(slots=True)
class Program:
    """A lowered adapter. Every tensor is finite, contiguous and on the CPU.

    ``edits`` maps a site name to its edits (the head may hold a LinearEdit and a HeadEdit).
    ``invocation_tokens``: when not empty, the program acts only from the start of the last occurrence of these tokens in
    the prompt; before it, and everywhere when they do not occur, the row is the base model. Such a program has no prologue. ``notes``
    are facts for people, such as the error of an approximation that its owner asked for.
    """

    edits: dict[str, list[Edit]] = field(default_factory=dict)
    invocation_tokens: tuple[int, ...] = ()
    prologue: Prologue = field(default_factory=Prologue)
    head: TaskHead | None = None
    notes: dict[str, float | str] = field(default_factory=dict)

    def add(self, site: str, edit: Edit) -> None:
        self.edits.setdefault(site, []).append(edit)

    def linear(self, site: str) -> LinearEdit:
        """The site's LinearEdit, made on first use, so that several parts of a checkpoint can meet in one edit."""
        return self._first(site, LinearEdit)

    def embed(self, site: str) -> EmbedEdit:
        """The same for an EmbedEdit."""
        return self._first(site, EmbedEdit)

    def _first(self, site: str, kind: type[E]) -> E:
        for edit in self.edits.get(site, ()):
            if isinstance(edit, kind):
                return edit
        made = kind()
        self.add(site, made)
        return made

    def tensors(self) -> Iterator[tuple[str, Edit | Prologue | HeadLayer, str, Tensor]]:
        """Every tensor as (site, owner, field name, tensor); ``prologue`` and ``task_head`` stand for a site where there is none."""
        owners: list[tuple[str, Edit | Prologue | HeadLayer]] = [
            (site, edit) for site, edits in self.edits.items() for edit in edits
        ]
        owners.append(("prologue", self.prologue))
        owners += [("task_head", layer) for layer in (self.head.layers if self.head else ())]
        for site, owner in owners:
            for item in fields(owner):
                value = getattr(owner, item.name)
                if isinstance(value, Tensor):
                    yield site, owner, item.name, value

    @property
    def is_empty(self) -> bool:
        """Whether it changes nothing and reads nothing."""
        return not self.edits and not len(self.prologue) and self.head is None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; one that stands at two places (a table of a tied embedding and head) counts once."""
        return sum({(tensor.data_ptr(), tensor.shape): tensor.nbytes for *_, tensor in self.tensors()}.values())

    def first_non_finite(self) -> str | None:
        """The first tensor that holds NaN or infinity, as ``site.field``; None when all are finite."""
        for site, _, name, tensor in self.tensors():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                return f"{site}.{name}"
        return None
