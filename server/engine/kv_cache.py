"""The paged K/V tensors. Knows blocks, not who holds them."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """K and V per layer, each ``(kv_heads, num_blocks, block_size, head_dim)``.

    Heads come first so that the keys of one head are contiguous within a block and a gather of block tables needs no
    transpose afterwards. Block 0 stays zero.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, 2, kv_heads, num_blocks, block_size, head_dim)
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._data = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = [(self._data[layer, 0], self._data[layer, 1]) for layer in range(num_layers)]

    @staticmethod
    def block_bytes(num_layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers."""
        return num_layers * 2 * kv_heads * block_size * head_dim * dtype.itemsize

    def zero(self, blocks: list[int]) -> None:
        """Clear blocks before their first use: what a former holder left could be NaN, and 0 * NaN is NaN."""
        if blocks:
            self._data.index_fill_(3, torch.tensor(blocks, device=self._data.device), 0)

    def write(self, layer: int, kv_slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store ``key``, ``value (kv_heads, T, head_dim)`` at ``kv_slots (T,)`` = block * block_size + offset."""
        for cache, new in zip(self._layers[layer], (key, value), strict=True):
            cache.view(cache.shape[0], -1, cache.shape[-1]).index_copy_(1, kv_slots, new)

    def copy(self, kv_slots: Tensor, entries: Tensor) -> None:
        """Store ``entries (layers, 2, kv_heads, n, head_dim)``, keys and values of all layers, at ``kv_slots (n,)``."""
        layers, two, heads, _, _, width = self._data.shape
        self._data.view(layers, two, heads, -1, width).index_copy_(3, kv_slots, entries)

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V of a layer, each ``(kv_heads, num_blocks, block_size, head_dim)``."""
        return self._layers[layer]
