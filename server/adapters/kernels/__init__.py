"""Low-rank kernels: ``lowrank_reference`` states the maths, the others are faster ways to the same result."""

from server.adapters.kernels.lowrank import LowRankRows, lowrank_concat, lowrank_gather, lowrank_reference

__all__ = ["LowRankRows", "lowrank_concat", "lowrank_gather", "lowrank_reference"]
