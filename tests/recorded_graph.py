"""A stand-in for a CUDA graph where there is no GPU: every operation that was run is run again, on the same tensors and with the same numbers.

As on a GPU, what the host computed while it recorded stays as it was, and what would wait for the device, or make a tensor of several of the
host's numbers, cannot be recorded: a step that replays rightly here depends on nothing but its tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

_aten = torch.ops.aten
_WAITS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default, _aten.masked_select.default}


class RecordedGraph:
    """A ``Graph`` on the CPU. ``replays`` counts."""

    def __init__(self) -> None:
        self._launches: list[Callable[[], object]] = []
        self.replays = 0

    def record(self, compute: Callable[[], None]) -> None:
        recorder = _Recorder(self._launches)
        run = InterpretedFunction.run

        def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
            # The interpreter's own operations are not the kernel's launch.
            recorder.is_paused = True
            run(kernel, *args, **kwargs)
            recorder.is_paused = False
            self._launches.append(lambda: run(kernel, *args, **kwargs))

        InterpretedFunction.run = launch
        try:
            with recorder:
                compute()
        finally:
            InterpretedFunction.run = run

    def replay(self) -> None:
        self.replays += 1
        for launch in self._launches:
            launch()


class _Recorder(TorchDispatchMode):
    def __init__(self, launches: list[Callable[[], object]]) -> None:
        super().__init__()
        self._launches = launches
        self.is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.is_paused:
            if func in _WAITS:
                raise RuntimeError(f"{func} waits for the device")
            if func is _aten.lift_fresh.default and args[0].dim():
                raise RuntimeError("a tensor is made of the host's numbers")
        found = func(*args, **kwargs)
        if not self.is_paused:
            self._launches.append(lambda: _again(func, args, kwargs, found))
        return found


def _again(func: Any, args: Any, kwargs: Any, found: Any) -> None:
    for old, new in zip(tree_leaves(found), tree_leaves(func(*args, **kwargs)), strict=True):
        # Views, and what was changed in place, are where they were.
        if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
            old.copy_(new)
