"""Flat tensors that matrices are laid out in. Knows numbers and offsets, not what they are of."""

from __future__ import annotations

import torch
from torch import Tensor

_PART = 1 << 20


class Flat:
    """Matrices appended into one flat tensor, each at a multiple of its own width."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []
        self._length = 0

    def append(self, tensor: Tensor) -> int:
        """The offset, in elements, that the matrix or vector will have."""
        padding = -self._length % tensor.shape[-1]
        if padding:
            self._parts.append(tensor.new_zeros(padding))
        offset = self._length + padding
        self._parts.append(tensor.reshape(-1))
        self._length = offset + tensor.numel()
        return offset

    def tensor(self) -> Tensor:
        """All of it, in a new tensor."""
        return torch.cat(self._parts) if self._parts else torch.zeros(0)


def shortened(flat: Tensor) -> Tensor:
    """fp32 numbers in bf16 where that holds every one of them exactly; everything else as it is."""
    if flat.dtype is not torch.float32:
        return flat
    # In parts, so that an adapter that was trained in fp32 is known by its first.
    is_exact = all(torch.equal(part.to(torch.bfloat16).to(part.dtype), part) for part in torch.split(flat, _PART))
    return flat.to(torch.bfloat16) if is_exact else flat
