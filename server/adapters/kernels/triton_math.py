"""What Triton kernels share: activations, and what their products take. Needs triton, which comes with PyTorch on GPU machines.

The kernels run compiled on a GPU; in tests without one, Triton's interpreter runs them on the CPU.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATION_CODES = {
    "linear": 0,
    "relu": 1,
    "gelu": 2,
    "gelu_new": 3,
    "gelu_pytorch_tanh": 3,
    "gelu_accurate": 3,
    "quick_gelu": 4,
    "silu": 5,
    "swish": 5,
    "tanh": 6,
    "sigmoid": 7,
    "leakyrelu": 8,
    "leaky_relu": 8,
    "relu6": 9,
    "mish": 10,
    "elu": 11,
    "selu": 12,
}
"""Of ``activate``, by the names of ACTIVATIONS."""

_OPERANDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def operand(x: Tensor) -> Any:
    """The dtype in which products take values of ``x``'s: its own; the interpreter, which cannot multiply bf16, takes them widened."""
    return _OPERANDS[x.dtype] if x.is_cuda else tl.float32


@triton.jit
def tanh(x):
    """From the exponential, whose overflow and underflow give the limits."""
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def activate(x, CODE: tl.constexpr):
    """Of fp32 values, by ACTIVATION_CODES."""
    if CODE == 1:
        x = tl.where(x < 0, 0.0, x)  # NaN stays NaN
    elif CODE == 2:
        x = 0.5 * x * (1 + tl.erf(x * 0.70710678118654752))
    elif CODE == 3:
        x = 0.5 * x * (1 + tanh(0.79788456080286536 * (x + 0.044715 * x * x * x)))
    elif CODE == 4:
        x = x * tl.sigmoid(1.702 * x)
    elif CODE == 5:
        x = x * tl.sigmoid(x)
    elif CODE == 6:
        x = tanh(x)
    elif CODE == 7:
        x = tl.sigmoid(x)
    elif CODE == 8:
        x = tl.where(x < 0, 0.01 * x, x)
    elif CODE == 9:
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif CODE == 10:
        # tanh(log(1 + e)) is n / (n + 2); above 20 it is 1 in fp32.
        e = tl.exp(tl.where(x > 20, 20.0, x))
        n = e * (e + 2)
        x = x * (n / (n + 2))
    elif CODE == 11:
        x = tl.where(x < 0, tl.exp(x) - 1, x)
    elif CODE == 12:
        x = 1.0507009873554805 * tl.where(x < 0, 1.6732632423543772 * (tl.exp(x) - 1), x)
    return x
