"""Compiles the Triton kernels for an H100, as their callers launch them, on a machine without a GPU. Prints a line for each.

A program of its own: the interpreter that tests use cannot be left once triton is imported.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from server.adapters.kernels import slots, triton_math, triton_slots
from server.adapters.norm_form import NormForm
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
    for module in (triton_slots, triton_attention):
        # On a GPU products take values as they are; here all tensors are on the CPU.
        module.operand = lambda x: triton_math._OPERANDS[x.dtype]
    dtype = torch.bfloat16

    arena, x, y = torch.zeros(1 << 20, dtype=dtype), torch.zeros(8, 4096, dtype=dtype), torch.zeros(8, 4096, dtype=dtype)
    vectors, rows = torch.zeros(1 << 14), torch.ones(8, dtype=torch.int32)
    places = torch.zeros(2, 9, slots.FIELDS, dtype=torch.int64)[:, 4]
    for terms in (
        slots.SlotTerms(16, False),
        slots.SlotTerms(16, True),
        slots.SlotTerms(0, True),
        slots.SlotTerms(64, True, 1, "gelu_new"),
    ):
        triton_slots.add_triton(y, x, arena, vectors, rows, places, terms)
    triton_slots.scale_triton(x, vectors, rows, places)
    triton_slots.pairs_triton(y, x, vectors, rows, places)
    triton_slots.norm_triton(y, x, rows, places, x[0], None, NormForm(is_centered=False, offset=0.0, eps=1e-5))
    triton_slots.norm_triton(y, x, rows, places, x[0], x[0], NormForm(is_centered=True, offset=0.0, eps=1e-5))
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
