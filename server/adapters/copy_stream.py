"""Copies to a CUDA device beside the steps that it runs: on a stream of their own. Knows streams and events, not what is copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class CudaCopy:
    """The copies before ``event``. See ``pending_copies.Copy``."""

    device: torch.device
    event: torch.cuda.Event

    def is_done(self) -> bool:
        return bool(self.event.query())  # type: ignore[no-untyped-call]

    def come_first(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)


class CudaCopyStream:
    """See ``pending_copies.CopyStream``. Steps run on the device's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, copy: Callable[[], None]) -> CudaCopy:
        """Memory that ``copy`` allocates must not outlive it: the device's allocator hands it on within this stream."""
        # Steps may still read what was in this range before, or its neighbour has just been moved out of it.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(self._stream):
                copy()
        except BaseException:
            # What has begun of it still writes to a range that is about to be another's.
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            raise
        return CudaCopy(self._device, self._stream.record_event())
