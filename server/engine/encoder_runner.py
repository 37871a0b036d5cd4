"""Running one batch of whole sequences on the device: between packed tokens and pooled hidden states, everything happens here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from server.adapters.apply import EditCache
from server.adapters.bank import Bank
from server.adapters.kernels import Kernel
from server.adapters.sites import SiteState, attach
from server.engine.encoder_attention import EncoderState
from server.engine.encoder_batch import EncoderBatch, Span
from server.engine.model import BaseModel
from server.engine.pooling import Pooled, pool


class EncoderRunner:
    """The base model with its sites attached, and its bank."""

    def __init__(self, base: BaseModel, bank: Bank, *, kernel: Kernel | None = None) -> None:
        self._base = base
        self._bank = bank
        self._attention = EncoderState()
        self._sites = SiteState(bank)
        self._edits = EditCache(bank, kernel=kernel)
        spec = base.spec
        for layer in range(spec.num_layers):
            module = base.model.get_submodule(spec.layer_site(layer, spec.names.attention))
            module.medley_attention = self._attention  # type: ignore[assignment]
            module.medley_layer = layer  # type: ignore[assignment]
        attach(base.model, spec, self._sites)

    @torch.inference_mode()
    def run(self, batch: EncoderBatch) -> list[Pooled | None]:
        """One forward pass. What each sequence's hidden states come to; None where they are not finite."""
        with self._bound(batch):
            hidden = self._base.model(input_ids=batch.input_ids[None], position_ids=batch.positions[None]).last_hidden_state[0]
        return [_pool(span, hidden) for span in batch.spans]

    @contextmanager
    def _bound(self, batch: EncoderBatch) -> Iterator[None]:
        if self._attention.batch is not None:
            raise RuntimeError("a step is already running on this model")
        slots = sorted({span.sequence.slot for span in batch.spans if span.sequence.slot})
        residents = [self._bank.resident(slot) for slot in slots]
        self._attention.batch = batch
        self._attention.kv = {item.slot: item.extras["prologue.kv"] for item in residents if item.prologue.num_kv}
        self._sites.edits = self._edits.get(batch.token_slots)
        self._sites.token_indices = batch.token_indices
        self._sites.place_virtual(batch.virtual_rows)
        try:
            yield
        finally:
            self._attention.batch = None
            self._attention.kv = {}
            self._sites.unbind()


def _pool(span: Span, hidden: Tensor) -> Pooled | None:
    """A sequence's rows, virtual tokens included unless every token's own row is wanted."""
    rows = hidden[span.start : span.end]
    if not bool(torch.isfinite(rows).all()):
        return None
    pooling = span.sequence.pooling
    return pool(pooling, span.tokens(hidden) if pooling == "none" else rows, None)
