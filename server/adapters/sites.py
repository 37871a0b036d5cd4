"""Sites: the modules of the base where edits attach, swapped in for the originals. No hooks, no patched forwards.

A site with nothing to do in a step is one attribute read away from the module that it wraps. Sites read the running step from a
``SiteState`` that the runner binds; rows and edits of the head are those of the sampled rows, not of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from server.adapters.activations import ACTIVATIONS
from server.adapters.apply import StepEdits
from server.adapters.bank import Bank
from server.adapters.base_spec import BaseSpec, SiteSpec, Sublayer
from server.adapters.bottleneck import SublayerResult, SublayerWork, run_sublayer, sublayer_work
from server.adapters.native_norm import native_norm_work
from server.adapters.norm import NormRun, NormWork, norm_work
from server.adapters.norm_form import NormForm, norm_form
from server.adapters.rows import VirtualRows
from server.adapters.streams import Streams

Replaced = tuple[int, int, Tensor]
"""Rows ``[start, end)`` of a site's output are these instead: (start, end, rows)."""


class SiteState:
    """What all sites of one model share: the bank, and of the step that is being run the edits (None: none).

    ``streams`` holds what one site of a layer keeps for another: a norm's input, a sub-layer's output. ``side`` holds what is added after
    a linear: (first row, end, values). ``virtual`` are the step's virtual tokens by the site whose output they stand for.
    ``token_indices`` tells of every row which of its sequence's real tokens it is, negative for virtual ones.
    """

    __slots__ = ("_early", "bank", "edits", "head_edits", "side", "streams", "token_indices", "virtual")

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.edits: StepEdits | None = None
        self.head_edits: StepEdits | None = None
        self.token_indices: Callable[[], list[int]] = list
        self.streams: dict[str, Tensor] = {}
        self.side: dict[str, list[tuple[int, int, Tensor]]] = {}
        self.virtual: dict[str, list[Replaced]] = {}
        self._early: dict[tuple[int, int, int], Tensor | None] = {}

    def early_rows(self, start: int, end: int, count: int) -> Tensor | None:
        """Those of rows ``[start, end)`` that are among the first ``count`` real tokens of their sequences; None when there are none."""
        key = (start, end, count)
        if key not in self._early:
            rows = [row for row, index in enumerate(self.token_indices()[start:end], start) if 0 <= index < count]
            self._early[key] = torch.tensor(rows, device=self.bank.rows.device) if rows else None
        return self._early[key]

    def place_virtual(self, placed: Iterable[VirtualRows]) -> None:
        """Say which rows of the step are virtual tokens."""
        for rows in placed:
            resident = self.bank.resident(rows.slot)
            tokens = resident.extras["prologue.tokens"][rows.offset : rows.offset + rows.end - rows.start]
            self.virtual.setdefault(resident.prologue.tokens_site, []).append((rows.start, rows.end, tokens))

    def unbind(self) -> None:
        """Forget the step."""
        self.edits = self.head_edits = None
        self.token_indices = list
        self.streams.clear()
        self.side.clear()
        self.virtual.clear()
        self._early.clear()


class Site(nn.Module):
    """A wrapped module. Attributes that models read off their submodules (``weight``, …) come from the original."""

    def __init__(self, inner: nn.Module, spec: SiteSpec, state: SiteState, sublayer: Sublayer | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.run: Callable[..., Any] = inner.forward
        """The original, without the search for hooks that calling a module begins with: there are none, and it takes longer than some operations."""
        self.spec = spec
        self.state = state
        self.sublayer = sublayer
        """The sub-layer whose output this site makes, or whose streams it keeps for another site."""

    @property
    def ends_sublayer(self) -> bool:
        """Whether bottlenecks attach here; if not, and there is a sub-layer, this site only keeps a stream."""
        return self.sublayer is not None and self.sublayer.site == self.spec.name

    def sublayer_work(self, edits: StepEdits) -> SublayerWork | None:
        """The bottlenecks of a step at this site."""
        return sublayer_work(edits, self.spec.name, self.spec.out_features) if self.ends_sublayer else None

    def keep(self, stream: Tensor) -> None:
        """Leave a stream for the site that ends the sub-layer."""
        if self.sublayer is not None and not self.ends_sublayer:
            self.state.streams[self.spec.name] = stream.reshape(-1, stream.shape[-1])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def put_virtual(self, y: Tensor) -> None:
        """Virtual tokens take the place of their rows of the output ``(…, T, hidden)``, as they are: no scale and no norm applies."""
        if self.state.virtual:
            for start, end, rows in self.state.virtual.get(self.spec.name, ()):
                y[..., start:end, :] = rows


class LinearSite(Site):
    """A linear with the terms of ``ir.LinearEdit``, each row with its own program's."""

    def forward(self, x: Tensor) -> Tensor:
        edits = self.state.edits
        if edits is None:
            return self.run(x)  # type: ignore[no-any-return]
        return self.finished(self.edited(x, edits), edits)

    def finished(self, y: Tensor, edits: StepEdits) -> Tensor:
        """The linear's result ``y (…, out)``, its linear terms included, with what else is added here. ``y`` may be changed."""
        if self.sublayer is None:
            return y
        if self.state.side:
            for start, end, values in self.state.side.pop(self.spec.name, ()):
                y.view(-1, y.shape[-1])[start:end] += values
        if "bottleneck" not in edits.kinds:
            return y
        self.keep(y)
        work = self.sublayer_work(edits)
        return y if work is None else self._joined(y, work)

    def _joined(self, y: Tensor, work: SublayerWork) -> Tensor:
        """Pre-norm: what the layer adds to the residual stream, bottlenecks included."""
        assert self.sublayer is not None
        residual = self.state.streams.get(self.sublayer.other)
        result = run_sublayer(work, Streams(y.reshape(-1, y.shape[-1]), residual), self.state.bank.vectors)
        for rows in result.whole:
            # The layer adds the residual stream to everything: for these rows it is in there already.
            assert residual is not None
            if rows is None:
                result.t.sub_(residual)
            else:
                result.t.index_add_(0, rows, -residual.index_select(0, rows))
        return result.t.view(y.shape)

    def edited(self, x: Tensor, edits: StepEdits) -> Tensor:
        """``x (…, in)`` to ``y (…, out)`` with the linear terms of a step."""
        work = edits.linear(self.spec.name, self.spec.in_features, self.spec.out_features)
        if work is None:
            return self.base(x, edits)
        rows = x.reshape(-1, x.shape[-1])
        y = work.after(self.base(work.before(rows), edits), rows)
        return y.view(*x.shape[:-1], y.shape[-1])

    def base(self, x: Tensor, edits: StepEdits) -> Tensor:
        """``base(x)`` for rows ``(N, in)``; what the linear terms are added to."""
        return self.run(x)  # type: ignore[no-any-return]


class HeadSite(LinearSite):
    """The output head, on sampled rows ``(S, hidden)``: a replaced head or rows of it, then the linear terms."""

    def forward(self, x: Tensor) -> Tensor:
        edits = self.state.head_edits
        if edits is None:
            return self.run(x)  # type: ignore[no-any-return]
        return self.edited(x, edits)

    def base(self, x: Tensor, edits: StepEdits) -> Tensor:
        y: Tensor = self.run(x)
        for start, end, found in edits.extras(self.spec.name, "head"):
            if "weight" in found:
                y[start:end] = F.linear(x[start:end], found["weight"], found.get("bias"))
            if "rows" in found:
                y[start:end, found["row_ids"]] = F.linear(x[start:end], found["rows"])
        return y


class NormSite(Site):
    """Replaced norm parameters, each row with its own program's."""

    def forward(self, x: Tensor) -> Tensor:
        edits = self.state.edits
        if edits is None:
            return self.run(x)  # type: ignore[no-any-return]
        if "bottleneck" not in edits.kinds:
            return self._normed(x, edits)
        self.keep(x)
        work = self.sublayer_work(edits)
        return self._normed(x, edits) if work is None else self._joined(x, edits, work)

    def _normed(self, x: Tensor, edits: StepEdits) -> Tensor:
        """``x (1, T, …, width)``, or ``(T, width)`` in families that flatten; between T and the width there may be heads."""
        y: Tensor = self.run(x)
        runs = edits.extras(self.spec.name, "norm")
        if runs:
            given, made = (x, y) if x.dim() == 2 else (x[0], y[0])
            edits.once(f"{self.spec.name} norms", lambda: self._work(edits, runs)).put(made, given)
        self.put_virtual(y)
        return y

    def _work(self, edits: StepEdits, runs: list[NormRun]) -> NormWork:
        if self.form is not None and edits.records is not None:
            return native_norm_work(edits.records.kernel, self.form, self.inner, runs)
        by_slot = None if self.form is None or edits.slots is None else edits.slots.norm(self.spec.name, self.inner, self.form)
        if by_slot is None and edits.is_lasting:
            raise RuntimeError(f"no kernel knows the norm {self.spec.name}: its rows are found by runs, which do not last")
        return by_slot or norm_work(self.inner, runs)

    @cached_property
    def form(self) -> NormForm | None:
        """What kernels know the norm as; None: as nothing."""
        return norm_form(self.inner)

    def _joined(self, x: Tensor, edits: StepEdits, work: SublayerWork) -> Tensor:
        """Post-norm: ``x`` is sub-layer's output plus residual; bottlenecks change the former before the norm."""
        assert self.sublayer is not None
        output, total = self.state.streams[self.sublayer.other], x.reshape(-1, x.shape[-1])
        streams = Streams(output, total - output, lambda: self._normed(x, edits).view(total.shape))
        result: SublayerResult = run_sublayer(work, streams, self.state.bank.vectors)
        y = self._normed((total + (result.t - output)).view(x.shape), edits).view(total.shape)
        for rows in result.whole:
            if rows is None:
                y = result.t
            else:
                y[rows] = result.t[rows]
        return y.view(x.shape)


class LayerSite(Site):
    """A whole layer: interventions on its output, at the first tokens of a sequence."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.run(*args, **kwargs)
        edits = self.state.edits
        if edits is not None and (here := edits.extras(self.spec.name, "intervention")):
            hidden = output[0] if isinstance(output, tuple) else output
            for start, end, found in here:
                rows = self.state.early_rows(start, end, found["positions"])
                if rows is not None:
                    self._intervene(hidden.view(-1, hidden.shape[-1]), rows, found)
        return output

    def _intervene(self, hidden: Tensor, rows: Tensor, found: dict[str, Any]) -> None:
        y = hidden.index_select(0, rows)
        inner = ACTIVATIONS[found["activation"]](F.linear(y, found["source"], found.get("source_bias")))
        if found["subtracts"]:
            inner = inner - F.linear(y, found["project"])
        hidden.index_add_(0, rows, inner @ found["project"])


class EmbeddingSite(Site):
    """``out_scale * (E[id] + down[id] @ up)``, replaced rows, or a replaced table; then the module's own embedding scale."""

    def forward(self, ids: Tensor) -> Tensor:
        y = self.run(ids)
        edits = self.state.edits
        if edits is None:
            return y  # type: ignore[no-any-return]
        for start, end, found in edits.extras(self.spec.name, "embed"):
            y[..., start:end, :] = self._embed(ids[..., start:end], found)
        self.put_virtual(y)
        return y  # type: ignore[no-any-return]

    def _embed(self, ids: Tensor, found: dict[str, Tensor]) -> Tensor:
        rows = F.embedding(ids, found.get("table", self.inner.weight))  # type: ignore[arg-type]
        if "down" in found:
            rows = rows + F.embedding(ids, found["down"]) @ found["up"]
        if "out_scale" in found:
            rows = (rows * found["out_scale"]).to(rows.dtype)
        if "rows" in found:
            place = torch.searchsorted(found["row_ids"], ids).clamp_(max=found["row_ids"].shape[0] - 1)
            replaced = found["row_ids"][place] == ids
            rows = torch.where(replaced[..., None], found["rows"][place], rows)
        if self.spec.embed_scale != 1.0:
            rows = rows * torch.tensor(self.spec.embed_scale, dtype=rows.dtype, device=rows.device)
        return rows


_KINDS: dict[str, type[Site]] = {
    "linear": LinearSite,
    "head": HeadSite,
    "norm": NormSite,
    "embedding": EmbeddingSite,
    "layer": LayerSite,
}


def attach(model: nn.Module, spec: BaseSpec, state: SiteState) -> None:
    """Swap every site of the base for its wrapper. Call after the weights are loaded."""
    sublayers = {name: sublayer for sublayer in spec.sublayers for name in (sublayer.site, sublayer.other)}
    # Inner modules first: the wrapper of a layer is not where its parts hang.
    for site in sorted(spec.sites, key=lambda item: item.kind == "layer"):
        if site.kind not in _KINDS:
            continue
        parent_name, _, child = site.name.rpartition(".")
        parent = model.get_submodule(parent_name)
        setattr(parent, child, _KINDS[site.kind](getattr(parent, child), site, state, sublayers.get(site.name)))
