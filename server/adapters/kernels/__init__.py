"""Kernels of edits: ``lowrank_reference`` states the low-rank maths, the others are faster ways to the same; ``NativeEdits`` is all in C++, and
``SlotKernels`` are those of GPUs."""

from server.adapters.kernels.gpu import load_triton
from server.adapters.kernels.lowrank import LowRankKernel, LowRankRows, lowrank_concat, lowrank_gather, lowrank_reference
from server.adapters.kernels.native import NativeEdits, NativeRuns, join_runs, load_native
from server.adapters.kernels.slots import SlotKernels

Kernel = LowRankKernel | NativeEdits | SlotKernels
"""What a step's edits run on, where it is chosen: all in C++, mostly by slot, or PyTorch with one low-rank kernel."""

__all__ = [
    "Kernel",
    "LowRankKernel",
    "LowRankRows",
    "NativeEdits",
    "NativeRuns",
    "SlotKernels",
    "join_runs",
    "load_native",
    "load_triton",
    "lowrank_concat",
    "lowrank_gather",
    "lowrank_reference",
]
