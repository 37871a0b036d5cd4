"""Low-rank kernels: ``lowrank_reference`` states the maths, the others are faster ways to the same result."""

from server.adapters.kernels.gpu import load_triton
from server.adapters.kernels.lowrank import Kernel, LowRankRows, lowrank_concat, lowrank_gather, lowrank_reference
from server.adapters.kernels.native import NativeLowRank, load_native

__all__ = [
    "Kernel",
    "LowRankRows",
    "NativeLowRank",
    "load_native",
    "load_triton",
    "lowrank_concat",
    "lowrank_gather",
    "lowrank_reference",
]
