"""Running one batch on the device: everything between a schedule and its logits happens here, and only here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.apply import EditCache
from server.adapters.bank import Bank
from server.adapters.kernels import Kernel
from server.adapters.sites import SiteState, attach
from server.engine.attention import AttentionState
from server.engine.batch import Batch
from server.engine.kv_cache import KVCache
from server.engine.model import BaseModel


@dataclass(frozen=True, slots=True)
class StepResult:
    """``logits (S, vocab)`` in fp32 (fp64 on an fp64 base) for the batch's sampled rows, and for each item whether all that it computed
    is finite."""

    logits: Tensor
    finite: tuple[bool, ...]


class Runner:
    """The base model with its sites attached, its K/V cache and its bank."""

    def __init__(self, base: BaseModel, cache: KVCache, bank: Bank, *, kernel: Kernel | None = None) -> None:
        self._base = base
        self._cache = cache
        self._sites = SiteState(bank)
        self._attention = AttentionState(cache, self._sites)
        self._edits = EditCache(bank, kernel=kernel)
        self._head_edits = EditCache(bank, kernel=kernel)
        attach(base.model, base.spec, self._sites)
        for layer in range(base.spec.num_layers):
            name = base.spec.layer_site(layer, base.spec.names.attention)
            output = base.spec.layer_site(layer, base.spec.names.attention_out)
            base.model.get_submodule(name).medley_attention = self._attention.at(name, output)  # type: ignore[assignment]

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        """One forward pass over the ragged batch."""
        self._cache.zero(batch.new_blocks)
        with self._bound(batch):
            hidden = self._base.backbone(
                input_ids=batch.input_ids[None], position_ids=batch.positions[None], use_cache=False
            ).last_hidden_state[0]
            logits = self._base.finish_logits(self._base.head(hidden.index_select(0, batch.sample_rows)))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return StepResult(logits, _finite_items(batch, hidden, logits))

    @contextmanager
    def _bound(self, batch: Batch) -> Iterator[None]:
        if self._attention.batch is not None:
            raise RuntimeError("a step is already running on this model")
        self._attention.batch = batch
        self._sites.positions = batch.positions
        self._sites.edits = self._edits.get(batch.token_slots)
        self._sites.head_edits = self._head_edits.get(batch.sample_slots)
        try:
            yield
        finally:
            self._attention.batch = None
            self._sites.unbind()


def _finite_items(batch: Batch, hidden: Tensor, logits: Tensor) -> tuple[bool, ...]:
    """A row that overflowed anywhere ends non-finite, since every token attends to itself and residuals add up."""
    rows, sampled = _finite_rows(hidden), _finite_rows(logits)
    if bool(rows.all()) and bool(sampled.all()):
        return (True,) * len(batch.items)
    finite, row, sample = [], 0, 0
    for item, samples in zip(batch.items, batch.item_samples, strict=True):
        finite.append(bool(rows[row : row + item.count].all()) and bool(sampled[sample : sample + samples].all()))
        row, sample = row + item.count, sample + samples
    return tuple(finite)


def _finite_rows(values: Tensor) -> Tensor:
    """Which rows of ``(n, width)`` hold no NaN and no infinity: extremes carry both, in one pass over the values."""
    if not values.numel():
        return torch.ones(values.shape[0], dtype=torch.bool, device=values.device)
    low, high = torch.aminmax(values, dim=-1)
    return torch.isfinite(low) & torch.isfinite(high)
