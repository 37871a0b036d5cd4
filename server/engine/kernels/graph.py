"""Recordings of what a device launches. Knows streams and memory, not what is recorded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """What a device launches again as it did before: the same kernels on the same addresses."""

    def record(self, compute: Callable[[], None]) -> None:
        """Record what ``compute`` launches; it is called more than once, and its effects are those of one call or of none.

        Raises RuntimeError for what cannot be recorded.
        """

    def replay(self) -> None:
        """Launch it."""


class CudaGraph:
    """A Graph on an NVIDIA GPU. Those of one ``pool`` share the memory that they compute in, and are never replayed beside each other."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def record(self, compute: Callable[[], None]) -> None:
        # Kernels are compiled, and libraries make what they keep, at a first run; neither can be recorded. PyTorch wants that run on
        # another stream than the default one.
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        # Loader threads may allocate pinned memory meanwhile, which is no concern of this recording.
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            compute()

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphs:
    """Makes recordings that share one pool."""

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def __call__(self) -> CudaGraph:
        return CudaGraph(self._pool)
