"""A linear on the native kernel, in place of Hugging Face's own. Knows a weight, no site and no block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from server.engine.kernels.native import Native


class PackedLinear(nn.Module):
    """A linear of ``weight (out, in)``, which is kept in the kernel's order only."""

    def __init__(self, native: Native, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Plain attributes: these modules never move, and a buffer is slower to look up.
        self._packed = native.pack(weight)
        self._bias = None if bias is None else bias.detach().float()
        self._native = native

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of the packed weight, whether it is bfloat16, and of the bias (0: none), as native blocks take them."""
        return (
            self._packed.data_ptr(),
            int(self._packed.dtype == torch.bfloat16),
            0 if self._bias is None else self._bias.data_ptr(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._native.linear(x, self._packed, self._bias, self.out_features)
