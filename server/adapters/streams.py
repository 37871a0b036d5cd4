"""The vectors that meet at a sub-layer's output. Knows names and rows, not what is made of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class Streams:
    """The vectors that meet at a sub-layer's output, each ``(N, hidden)`` and computed when somebody asks.

    ``residual`` may be None where no program of the step reads it. ``normed`` gives the norm of the sum, on post-norm bases.
    """

    def __init__(self, sublayer: Tensor, residual: Tensor | None, normed: Callable[[], Tensor] | None = None) -> None:
        self.sublayer = sublayer
        self._residual = residual
        self._normed = normed
        self._known: dict[str, Tensor] = {"sublayer": sublayer}

    def get(self, name: str) -> Tensor:
        """A stream of ``ir.Stream`` by name."""
        if name not in self._known:
            self._known[name] = self._make(name)
        return self._known[name]

    def rows(self, start: int, end: int) -> Streams:
        """The same streams of some rows only."""
        part = Streams(self.sublayer[start:end], None if self._residual is None else self._residual[start:end])
        if self._normed is not None:
            part._normed = lambda: self.get("normed")[start:end]
        return part

    def _make(self, name: str) -> Tensor:
        if name == "normed" and self._normed is not None:
            return self._normed()
        if self._residual is None:
            raise RuntimeError(f"the {name} stream is not known at this site")
        return self._residual if name == "residual" else self.sublayer + self._residual
