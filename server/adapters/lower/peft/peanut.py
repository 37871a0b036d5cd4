"""PEANuT (Zhong et al. 2024) as PEFT stores it: a small network maps the rows of the transposed weight; its output is a low-rank change."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.cheapest import product, set_cheapest
from server.adapters.lower.method import Method, integer, no_effect, number, only
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS, Group, lower_groups
from server.adapters.lower.source import Source

_MAX_DEPTH = 64
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
}


def lower(source: Source, base: Base) -> Program:
    """``W += scaling * B h(W.T).T``: the network's output is ``down``, B is ``up``."""
    depth, scaling = source.config.get("depth", 0), source.config.get("scaling", 1.0)
    activation = _ACTIVATIONS[source.config.get("act_fn", "relu")]
    encoders, decoders = ([f"peanut_{part}.{index}.weight" for index in range(depth)] for part in ("encoders", "decoders"))

    def lower_site(program: Program, group: Group) -> None:
        rows = base.weight(group.site).T
        inner, outer = ([group[name] for name in names] for names in (encoders, decoders))
        down = _network(rows, group["peanut_A.weight"], inner, outer, activation).T
        set_cheapest(source, program.linear(group.site), product(down, (group["peanut_B.weight"] * scaling).T))

    shapes: dict[str, tuple[str | int, ...]] = {"peanut_A.weight": ("r", "out"), "peanut_B.weight": ("out", "r")}
    shapes |= dict.fromkeys((*encoders, *decoders), ("r", "r"))
    return lower_groups(source, base, "peanut_", shapes, lower_site)


def _network(
    rows: Tensor, first: Tensor, encoders: list[Tensor], decoders: list[Tensor], activation: Callable[[Tensor], Tensor]
) -> Tensor:
    """``rows (in, out)`` → ``(in, rank)``; every decoder's output meets the input of its mirrored encoder."""
    state = activation(rows @ first.T)
    residuals = []
    for encoder in encoders:
        residuals.append(state)
        state = activation(state @ encoder.T)
    for decoder in decoders:
        state = activation(state @ decoder.T) + residuals.pop()
    return state


METHOD = Method(
    name="PEANUT",
    summary="low rank, computed from the base's weight by the stored network",
    fields={
        **WRAPPED_FIELDS,
        "depth": integer(0, _MAX_DEPTH),
        "act_fn": only(*_ACTIVATIONS),
        "scaling": number(-1e6, 1e6),
        # The tensors show the rank.
        "r": no_effect,
    },
    lower=lower,
)
