"""What a step's programs do at a linear, in PyTorch operations on any device. Knows rows and terms; the meaning is ``ir.LinearEdit``'s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from server.adapters.activations import ACTIVATIONS
from server.adapters.kernels import LowRankKernel, LowRankRows
from server.adapters.pairs import swap_pairs
from server.adapters.rows import VectorRows, add_rows, pick, scale_rows, shift_rows, take


class LinearWork(Protocol):
    """The work of a step at one linear site, on both sides of the base."""

    def before(self, x: Tensor) -> Tensor:
        """What the base reads in place of ``x (N, in)``."""

    def after(self, z: Tensor, x: Tensor) -> Tensor:
        """The result ``(N, out)`` from the base's output ``z``, which may be changed, and what came in."""


class LongRun(NamedTuple):
    """A run with matrices of its own: ``down (rank, in)``, ``up (rank, out)``, ``bias (rank,)`` or None."""

    start: int
    end: int
    down: Tensor
    up: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class LowRankWork:
    """``y += act(x @ down.T + bias) @ up`` for rows of many programs: long runs as matrix products, everything else by one kernel."""

    long_runs: tuple[LongRun, ...]
    short_rows: LowRankRows | None
    kernel: LowRankKernel
    down: Tensor | None
    up: Tensor | None
    activation: str = "linear"

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add to the rows of ``y (N, out)`` in place, from ``x (N, in)``, which may be ``y`` itself."""
        for start, end, down, up, bias in self.long_runs:
            inner = x[start:end] @ down.T
            if bias is not None:
                inner = inner + bias
            y[start:end].addmm_(ACTIVATIONS[self.activation](inner), up)
        if self.short_rows is not None and self.down is not None and self.up is not None:
            self.kernel(y, x, self.down, self.up, self.short_rows)


class PairRows(NamedTuple):
    """Rows whose outputs are paired in groups of one size, with their ``pair_scale``."""

    scale: VectorRows
    group: int


@dataclass(frozen=True, slots=True)
class LooseWork:
    """Terms at one linear site that go run by run, or need the base's output as it was.

    ``runs`` have tensors of their own, by field: ``dense``, ``rotation``, ``left`` and ``right``.
    """

    vectors: Tensor
    pairs: tuple[PairRows, ...]
    runs: tuple[tuple[int, int, dict[str, Tensor]], ...]

    def rotated(self, x: Tensor) -> Tensor:
        """``x`` with the rotated rows replaced: every block of ``b`` inputs times its ``(b, b)`` matrix."""
        if not any("rotation" in found for _, _, found in self.runs):
            return x
        rotated = x.clone()
        for start, end, found in self.runs:
            if (rotation := found.get("rotation")) is not None:
                size = rotation.shape[-1]
                blocks = x[start:end].view(end - start, -1, size).transpose(0, 1)
                rotated[start:end] = torch.matmul(blocks, rotation).transpose(0, 1).reshape(end - start, -1)
        return rotated

    def add_pairs(self, y: Tensor, z: Tensor) -> None:
        """``y += pair_scale * swap(z)`` in place, for the rows that have one; ``z`` is another tensor."""
        for scale, group in self.pairs:
            swapped = swap_pairs(pick(z, scale.rows), group)
            add_rows(y, (swapped * take(self.vectors, scale, z.shape[-1])).to(y.dtype), scale.rows)

    def add_products(self, y: Tensor, x: Tensor) -> None:
        """``y += x @ dense.T + kron(left, right) x`` in place."""
        for start, end, found in self.runs:
            if "dense" in found:
                y[start:end].addmm_(x[start:end], found["dense"].T)
            if "left" in found:
                left, right = found["left"], found["right"]
                blocks = x[start:end].view(end - start, left.shape[1], right.shape[1])
                y[start:end] += torch.matmul(left, blocks @ right.T).reshape(end - start, -1)


@dataclass(frozen=True, slots=True)
class SiteWork:
    """What the programs of a step do at one linear site."""

    vectors: Tensor
    low_rank: LowRankWork | None
    in_scale: VectorRows | None
    out_scale: VectorRows | None
    shift: VectorRows | None
    loose: LooseWork | None

    def before(self, x: Tensor) -> Tensor:
        """``rotate(in_scale * x)`` for the rows that have one."""
        scaled = x if self.in_scale is None else scale_rows(x, self.vectors, self.in_scale)
        return scaled if self.loose is None else self.loose.rotated(scaled)

    def after(self, z: Tensor, x: Tensor) -> Tensor:
        """All other terms."""
        y = z if self.out_scale is None else scale_rows(z, self.vectors, self.out_scale)
        if self.loose is not None and self.loose.pairs:
            y = y.clone() if y is z else y
            self.loose.add_pairs(y, z)
        if self.low_rank is not None:
            self.low_rank.add(y, x)
        if self.loose is not None:
            self.loose.add_products(y, x)
        if self.shift is not None:
            shift_rows(y, self.vectors, self.shift)
        return y
