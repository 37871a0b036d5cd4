"""Running one batch on the device: everything between a schedule and its logits happens here, and only here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from server.adapters.apply import EditCache, StepEdits
from server.adapters.bank import Bank
from server.adapters.kernels import Kernel
from server.adapters.sites import SiteState, attach
from server.engine.attention import AttentionState
from server.engine.batch import Batch
from server.engine.graphs import DecodeGraphs, GraphLimits
from server.engine.kernels import AttentionKernel, GatheredAttention
from server.engine.kernels.graph import Graph
from server.engine.kv_cache import KVCache
from server.engine.model import BaseModel
from server.engine.pooling import Pooled, pool


@dataclass(frozen=True, slots=True)
class StepResult:
    """``logits (S, vocab)`` in fp32 (fp64 on an fp64 base) for the batch's sampled rows. For each item: whether all that it computed
    is finite, and what its hidden states have come to, where they are pooled instead of sampled."""

    logits: Tensor
    finite: tuple[bool, ...]
    pooled: tuple[Pooled | None, ...]


class Runner:
    """The base model with its sites attached, its K/V cache and its bank."""

    def __init__(
        self,
        base: BaseModel,
        cache: KVCache,
        bank: Bank,
        *,
        kernel: Kernel | None = None,
        attention: AttentionKernel | None = None,
        graphs: tuple[Callable[[], Graph], GraphLimits] | None = None,
    ) -> None:
        """``graphs``: what records decode steps, and which; its kernels must be such as can be recorded."""
        self._base = base
        self._cache = cache
        self._bank = bank
        self._sites = SiteState(bank)
        self._attention = AttentionState(cache, self._sites, attention or GatheredAttention())
        self._edits = EditCache(bank, kernel=kernel)
        self._graphs = DecodeGraphs(self._forward, self._edits, graphs[1], graphs[0], bank.rows.device) if graphs else None
        attach(base.model, base.spec, self._sites)
        for layer in range(base.spec.num_layers):
            name = base.spec.layer_site(layer, base.spec.names.attention)
            output = base.spec.layer_site(layer, base.spec.names.attention_out)
            base.model.get_submodule(name).medley_attention = self._attention.at(layer, name, output)  # type: ignore[assignment]

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        """One forward pass over the ragged batch. Blocks that are new to their sequences are zero."""
        for copy in batch.copies:
            prefix = self._bank.resident(copy.slot).extras["prologue.kv"]
            self._cache.copy(copy.kv_slots, prefix[:, :, :, copy.first : copy.end])
        edits = self._edits.get(batch.token_slots)
        replayed = None if self._graphs is None else self._graphs.run(batch, edits)
        hidden, logits = replayed or self._forward(batch, edits, self._edits.get(batch.sample_slots))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return StepResult(logits, _finite_items(batch, hidden, logits), tuple(_pool_items(batch, hidden)))

    def _forward(self, batch: Batch, edits: StepEdits | None, head_edits: StepEdits | None) -> tuple[Tensor, Tensor]:
        """Hidden states ``(T, hidden)`` and logits ``(S, vocab)`` of a batch: what a graph records, nothing of which waits for the device."""
        with self._bound(batch, edits, head_edits):
            hidden = self._base.backbone(
                input_ids=batch.input_ids[None], position_ids=batch.positions[None], use_cache=False
            ).last_hidden_state[0]
            return hidden, self._base.finish_logits(self._base.head(hidden.index_select(0, batch.sample_rows)))

    @contextmanager
    def _bound(self, batch: Batch, edits: StepEdits | None, head_edits: StepEdits | None) -> Iterator[None]:
        self._attention.bind(batch)
        self._sites.token_indices = batch.token_indices
        self._sites.edits = edits
        self._sites.head_edits = head_edits
        self._sites.place_virtual(batch.virtual_rows)
        try:
            yield
        finally:
            self._attention.unbind()
            self._sites.unbind()


def _pool_items(batch: Batch, hidden: Tensor) -> Iterator[Pooled | None]:
    """Virtual tokens count as rows, except where every token's own row is wanted."""
    row = 0
    for item in batch.items:
        sequence, end = item.sequence, row + item.count
        skipped = max(0, sequence.num_prologue - item.start) if sequence.pooling == "none" else 0
        rows = hidden[row + skipped : end]
        yield pool(sequence.pooling, rows, sequence.pooled) if sequence.pooling and len(rows) else sequence.pooled
        row = end


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
    """Which rows of ``(n, width)`` hold no NaN and no infinity: extremes carry both. (One by one, because ``aminmax`` takes ten times as long.)"""
    return torch.isfinite(values.amin(-1)) & torch.isfinite(values.amax(-1))
