"""Where the time of an engine's steps goes: clocks around modules and functions, each counting its own time only.

Knows the places of a step (sites, attention, sampling, …), not how they are computed: what stands behind a site may be PyTorch or native.
Times are exclusive, so that the parts of a step add up to it; what no clock covers counts for the part around it.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from benchmarks.step_parts import ATTENTION, EDITS, LINEARS, REST, SAMPLING, SMALL
from server.adapters.sites import HeadSite, LinearSite, Site
from server.engine import attention
from server.engine import engine as engine_module
from server.engine.engine import Engine
from server.engine.kernels.modules import GatedMLP, RotaryAttention
from server.engine.kernels.native import BLOCK_PARTS, Native
from server.engine.kernels.stack import DecoderStack

_BLOCK_PARTS = tuple({"linears": LINEARS, "edits": EDITS, "small": SMALL, "attention": ATTENTION}[part] for part in BLOCK_PARTS)
_SMALL_CLASSES = ("RotaryEmbedding", "MLP")
"""What a family calls the modules whose own time, without the linears inside, is small operations."""


class StepClock:
    """Seconds by part since the last ``take``. Clocks nest: time inside an inner one is not the outer one's."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._parts: list[str] = []
        self._since = 0.0
        self.blocks = torch.zeros(len(_BLOCK_PARTS), dtype=torch.float64)
        """What native blocks took, by part; their clocks count it for the rest until ``take``."""

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its own time counted for ``part``."""

        def timed(*arguments: Any, **named: Any) -> Any:
            self._enter(part)
            try:
                return function(*arguments, **named)
            finally:
                self._leave()

        return timed

    def take(self) -> dict[str, float]:
        """What was counted, and start again. Call outside all clocks."""
        for part, seconds in zip(_BLOCK_PARTS, self.blocks.tolist(), strict=True):
            self._seconds[part] += seconds
            self._seconds[REST] -= seconds
        self.blocks.zero_()
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken

    def _enter(self, part: str) -> None:
        now = time.perf_counter()
        if self._parts:
            self._seconds[self._parts[-1]] += now - self._since
        self._parts.append(part)
        self._since = now

    def _leave(self) -> None:
        now = time.perf_counter()
        self._seconds[self._parts.pop()] += now - self._since
        self._since = now


@contextmanager
def clocked(engine: Engine) -> Iterator[StepClock]:
    """An engine whose steps are clocked while the context is open. The model keeps its clocks afterwards, so that it is of no other use."""
    clock = StepClock()
    model: nn.Module = engine._base.model
    for module in model.modules():
        if isinstance(module, Site):
            _clock_site(clock, module)
        elif isinstance(module, GatedMLP | RotaryAttention):
            _clock(clock, REST, module, "forward")
            _clock(clock, EDITS, module, "together")
        elif isinstance(module, DecoderStack):
            _clock(clock, EDITS, module, "together")
        elif type(module).__name__.endswith(_SMALL_CLASSES):
            _clock(clock, SMALL, module, "forward")
    plain = attention.paged_attention
    AttentionInterface.register(attention.NAME, clock.around(ATTENTION, plain))
    family = sys.modules[type(model).__module__]
    patched = [
        (family, "apply_rotary_pos_emb", SMALL),
        (Native, "rotate_and_keep", SMALL),
        (attention.AttentionPlace, "attend", ATTENTION),
        (engine_module, "sample", SAMPLING),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in patched if hasattr(owner, name)]
    for owner, name, part in patched:
        _clock(clock, part, owner, name)
    if engine._kernels.native is not None:
        _clock_blocks(clock, engine._kernels.native)
    _clock(clock, REST, engine, "step")
    try:
        yield clock
    finally:
        AttentionInterface.register(attention.NAME, plain)
        for owner, name, function in kept:
            setattr(owner, name, function)


def _clock_site(clock: StepClock, site: Site) -> None:
    """The wrapped module by what it is; what the site does around it is the adapters'."""
    is_linear = isinstance(site, LinearSite | HeadSite)
    kind = LINEARS if is_linear else REST if site.spec.kind in ("layer", "embedding") else SMALL
    _clock(clock, EDITS, site, "forward")
    _clock(clock, kind, site, "run")
    # Where a block calls its linears itself, what comes after the last one is still the site's.
    _clock(clock, EDITS, site, "finished")


def _clock(clock: StepClock, part: str, owner: Any, name: str) -> None:
    """Put a clock around an attribute that is there; a place that the engine does not have has no time of its own."""
    function = getattr(owner, name, None)
    if function is not None:
        setattr(owner, name, clock.around(part, function))


def _clock_blocks(clock: StepClock, native: Native) -> None:
    """Blocks that are one native call tell themselves what their parts took."""
    native.block_seconds = clock.blocks = torch.zeros(len(_BLOCK_PARTS), dtype=torch.float64)
    _clock(clock, REST, native, "gated_mlp")
    _clock(clock, REST, native, "attention_block")
    _clock(clock, REST, native, "decoder_layers")
