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
    """A Graph on an NVIDIA GPU, made by ``CudaGraphs``."""

    def __init__(self, makes: CudaGraphs) -> None:
        self._makes = makes
        self._graph = torch.cuda.CUDAGraph()

    def record(self, compute: Callable[[], None]) -> None:
        current, stream = torch.cuda.current_stream(), self._makes.stream
        try:
            # Kernels are compiled, and libraries make what they keep, at a first run; neither can be recorded.
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                compute()
            # Loader threads may allocate pinned memory meanwhile, which is no concern of this recording.
            with torch.cuda.graph(self._graph, pool=self._makes.pool, stream=stream, capture_error_mode="thread_local"):
                compute()
        except BaseException:
            # A recording that fails may leave its stream the current one, and its pool as if the recording went on.
            torch.cuda.set_stream(current)
            self._makes.renew_pool()
            raise
        finally:
            current.wait_stream(stream)

    def replay(self) -> None:
        self._graph.replay()


class CudaGraphs:
    """Makes recordings, which share the memory of one ``pool`` to compute in, since they are never replayed beside each other. All are made on
    one ``stream``, which PyTorch wants to be another than the default one, since libraries keep memory for each that they have seen."""

    def __init__(self) -> None:
        self._pool: Any = None

    @cached_property
    def stream(self) -> Any:
        return torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @property
    def pool(self) -> Any:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def renew_pool(self) -> None:
        """Later recordings have memory of their own."""
        self._pool = None

    def __call__(self) -> CudaGraph:
        return CudaGraph(self)
