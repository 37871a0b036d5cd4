"""Compiles the Triton kernels for an H100, as their callers launch them, on a machine without a GPU. Prints a line for each.

A program of its own: the interpreter that tests use cannot be left once triton is imported.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from server.adapters.kernels import LowRankRows, triton_lowrank, triton_math
from server.adapters.kernels.triton_vectors import scale_rows, shift_rows
from server.adapters.rows import VectorRows
from server.engine.kernels import triton_attention
from server.engine.kernels.paged import PagedRows, Rules


class Driver:
    """What the compiler asks of the machine."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(run: Any) -> Any:
    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"]
        sys.stdout.write(f"{self.fn.__name__} {kernel.metadata.shared}\n")
        return kernel

    return compiled


def main() -> None:
    """In bf16, with shapes of Llama 3 8B."""
    triton.runtime.driver.set_active(Driver())
    JITFunction.run = compile_only(JITFunction.run)
    for module in (triton_lowrank, triton_attention):
        # On a GPU products take values as they are; here all tensors are on the CPU.
        module.operand = lambda x: triton_math._OPERANDS[x.dtype]
    dtype = torch.bfloat16

    def indices(*values: int) -> torch.Tensor:
        return torch.tensor(values)

    arena, x, y = torch.zeros(64, 4096, dtype=dtype), torch.zeros(8, 4096, dtype=dtype), torch.zeros(8, 4096, dtype=dtype)
    none = torch.zeros(16, dtype=torch.int64)
    index = LowRankRows(
        None, none, none, none, indices(0, 8), indices(0, 8), indices(0, 8), indices(8, 8), none, none, none, 8
    )  # fmt: skip
    triton_lowrank.lowrank_triton(y, x, arena, arena, index)
    triton_lowrank.lowrank_triton(
        y, x, arena, arena, replace(index, rows=indices(1, 3), bias=torch.zeros(16, dtype=dtype), activation="gelu_new")
    )
    vectors = torch.zeros(8192)
    for rows in (None, indices(1, 3)):
        work = VectorRows(rows, indices(0, 4096))
        scale_rows(x, vectors, work)
        shift_rows(y, vectors, work)
    query, cache = torch.zeros(8, 32, 128, dtype=dtype), torch.zeros(8, 64, 16, 128, dtype=dtype)
    numbers = torch.ones(8, dtype=torch.int32)
    for sequences, rules in ((8, Rules(0.1)), (2, Rules(0.1)), (2, Rules(0.1, window=64, softcap=30.0))):
        tables = torch.zeros(sequences, 64, dtype=torch.int32)
        triton_attention.attention_triton(
            torch.empty_like(query), query, cache, cache, PagedRows(tables, numbers, numbers), rules
        )


if __name__ == "__main__":
    warnings.simplefilter("error")
    main()
