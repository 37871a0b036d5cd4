"""PEANuT (Zhong et al. 2024) as PEFT stores it: a small network maps the rows of the transposed weight; its output is a low-rank change."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.delta import add_product, linears_with, take_all
from server.adapters.lower.method import COMMON_FIELDS, Method, integer, no_effect, number, only
from server.adapters.lower.peft.replaced import lower_replaced_modules
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
    program = Program()
    depth, scaling = source.config.get("depth", 0), source.config.get("scaling", 1.0)
    for spec in linears_with(source, base, "peanut_A.weight", "peanut_B.weight"):
        found = _take(source, spec, depth)
        if found is None:
            continue
        first, last, *hidden = (tensor.to(base.compute) for tensor in found)
        activation = _ACTIVATIONS[source.config.get("act_fn", "relu")]
        down = _network(base.weight(spec.name).T, first, hidden[:depth], hidden[depth:], activation).T
        add_product(program.linear(spec.name), down, (last * scaling).T)
    lower_replaced_modules(source, base, program)
    return program


def _take(source: Source, spec: SiteSpec, depth: int) -> list[Tensor] | None:
    """A, B, the encoders and the decoders, all of one rank."""
    names = [f"peanut_{part}.{index}.weight" for part in ("encoders", "decoders") for index in range(depth)]
    shapes: dict[str, tuple[int | None, ...]] = {
        "peanut_A.weight": (None, spec.out_features),
        "peanut_B.weight": (spec.out_features, None),
        **dict.fromkeys(names, (None, None)),
    }
    found = take_all(source, spec.name, shapes)
    if found is None:
        return None
    rank = found[0].shape[0]
    if found[1].shape[1] != rank or any(tuple(tensor.shape) != (rank, rank) for tensor in found[2:]):
        source.fault("wrong_rank", spec.name, "A, B, encoders and decoders must have one rank", str(rank))
        return None
    return found


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
        **COMMON_FIELDS,
        "depth": integer(0, _MAX_DEPTH),
        "act_fn": only(*_ACTIVATIONS),
        "scaling": number(-1e6, 1e6),
        "modules_to_save": no_effect,
        "r": no_effect,
        **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), no_effect),
        "init_weights": no_effect,
    },
    lower=lower,
)
