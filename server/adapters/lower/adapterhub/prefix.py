"""Prefix tuning (Li & Liang 2021) as AdapterHub stores it: keys and values of every layer, or a small network that makes them.

The prefix, flat or as ``W2 act(W1 wte + b1) + b2``, reads as ``(length, 2 * layers, kv_heads, head_dim)``: layer l's keys at 2l, its
values at 2l + 1. Keys are never rotated, and real tokens keep their positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from server.adapters.activations import ACTIVATIONS
from server.adapters.ir import Program, Prologue
from server.adapters.lower.adapterhub.options import ENVELOPE, Part, activation, activation_name, one_config
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, Rule, integer, no_effect, only
from server.adapters.lower.source import Source

_KEY = "prefix_tunings.self_prefix."

_FIELDS: dict[str, Rule] = {
    "architecture": only("prefix_tuning"),
    "prefix_length": integer(1, 4096),
    "non_linearity": activation_name,
    # The gate averages over all tokens of the sequence, those to come included.
    "use_gating": only(False, None),
    # A prefix that some layers lack would make their keys start at other places.
    "leave_out": only(None),
    # Tensors say whether the prefix is flat. There is no cross attention here.
    **dict.fromkeys(("flat", "bottleneck_size", "encoder_prefix", "cross_prefix", "shared_gating"), no_effect),
    **dict.fromkeys(("dropout", "init_weights_seed"), no_effect),
}


def _lower(source: Source, base: Base, program: Program, given: Mapping[str, Any]) -> None:
    """The prefix of one config, as the program's prologue."""
    spec, length = base.spec, given.get("prefix_length", 30)
    width = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim
    if f"{_KEY}control_trans" in source.shared:
        found = source.take_shared(f"{_KEY}control_trans", (length * width,))
        prefix = None if found is None else found.to(base.compute)
    else:
        prefix = _network(source, base, length, width, activation(source, given.get("non_linearity", "tanh")))
    if prefix is None:
        message = "a prefix needs control_trans, or wte and a network of two linears, of the base's layers and heads"
        source.fault("missing_tensor", f"{_KEY}control_trans", message)
        return
    kv = prefix.view(length, spec.num_layers, 2, spec.num_kv_heads, spec.head_dim).permute(1, 2, 3, 0, 4)
    program.prologue = Prologue(kv=kv, shifts=False)


def _network(source: Source, base: Base, length: int, width: int, act: str) -> Tensor | None:
    inputs = source.take_shared(f"{_KEY}wte.weight", (length, base.spec.hidden_size))
    first = source.take_shared(f"{_KEY}control_trans.0.weight", (None, base.spec.hidden_size))
    size = None if first is None else first.shape[0]
    first_bias = source.take_shared(f"{_KEY}control_trans.0.bias", (size,))
    second = source.take_shared(f"{_KEY}control_trans.2.weight", (width, size))
    second_bias = source.take_shared(f"{_KEY}control_trans.2.bias", (width,))
    if inputs is None or first is None or first_bias is None or second is None or second_bias is None:
        return None
    source.reserve(length * width)
    x, w1, b1, w2, b2 = (tensor.to(base.compute) for tensor in (inputs, first, first_bias, second, second_bias))
    return F.linear(ACTIVATIONS[act](F.linear(x, w1, b1)), w2, b2)


PREFIX = Part(_FIELDS, _lower)
METHOD = Method(
    name="prefix_tuning",
    summary="keys and values in front of every layer's, positions not shifted; a network that makes them is evaluated once",
    fields=ENVELOPE,
    lower=one_config(PREFIX),
)
