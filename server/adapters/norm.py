"""Replaced norm parameters in PyTorch operations on any device. Knows rows and a norm's own module, which does the maths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.adapters.apply import LONG_RUN

NormRun = tuple[int, int, dict[str, Tensor]]
"""Rows ``[start, end)`` and the parameters that they have in place of the norm's own: (start, end, {name: tensor})."""


class NormWork(Protocol):
    """The rows of a step with parameters of their own at one norm."""

    def put(self, y: Tensor, x: Tensor) -> None:
        """Put the norms of those rows of ``x (T, …, width)`` into ``y``, which has the same shape, in place."""


@dataclass(frozen=True, slots=True)
class ShortRows:
    """Rows ``(n,)`` with norm parameters of their own, ``weight`` and ``bias (n, width)``."""

    rows: Tensor
    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True)
class ModuleNormWork:
    """The module's own code: once for each long run, and one pass with a row of parameters each for all short ones."""

    module: nn.Module
    long_runs: tuple[NormRun, ...]
    short: ShortRows | None

    def put(self, y: Tensor, x: Tensor) -> None:
        """As ``NormWork``."""
        for start, end, found in self.long_runs:
            y[start:end] = torch.func.functional_call(self.module, found, (x[start:end],))
        if self.short is not None:
            y.index_copy_(0, self.short.rows, self._by_row(x.index_select(0, self.short.rows), self.short))

    def _by_row(self, x: Tensor, short: ShortRows) -> Tensor:
        """The norm of ``x (n, …, width)``, each row with its own parameters."""
        shape = (x.shape[0], *(1,) * (x.dim() - 2), x.shape[-1])
        weight = short.weight.view(shape)
        if not isinstance(self.module, nn.LayerNorm):
            # RMS norms multiply by a weight that broadcasts, each in its family's own way.
            return torch.func.functional_call(self.module, {"weight": weight}, (x,))  # type: ignore[no-any-return]
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.layer_norm(x.to(wide), self.module.normalized_shape, eps=self.module.eps) * weight
        return (normed if short.bias is None else normed + short.bias.view(shape)).to(x.dtype)


def norm_work(module: nn.Module, runs: Sequence[NormRun]) -> ModuleNormWork:
    """The work of runs with norm parameters, which need not replace all that the norm has."""
    return ModuleNormWork(module, tuple(run for run in runs if run[1] - run[0] >= LONG_RUN), _short_rows(module, runs))


def _short_rows(module: nn.Module, runs: Sequence[NormRun]) -> ShortRows | None:
    short = [(start, end, found) for start, end, found in runs if end - start < LONG_RUN]
    if not short:
        return None
    own = dict(module.named_parameters())

    def expanded(name: str) -> Tensor:
        return torch.cat([found.get(name, own[name]).expand(end - start, -1) for start, end, found in short])

    rows = torch.cat([torch.arange(start, end) for start, end, _ in short]).to(own["weight"].device)
    return ShortRows(rows, expanded("weight"), expanded("bias") if "bias" in own else None)
