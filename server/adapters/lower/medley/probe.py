"""Probes: a linear or a small MLP on the frozen base's last hidden states, in a format of Medley's own (docs/FORMATS.md).

Config: ``medley_type`` "PROBE", ``pooling``, ``activation`` (between the layers), ``labels``, ``multi_label``. Tensors: ``N.weight (out, in)`` and
``N.bias (out,)`` for layers 0, 1, …, the first on the hidden size, the last with one output a label.
"""

from __future__ import annotations

from typing import Any

from server.adapters.ir import HeadLayer, Pooling, Program, TaskHead
from server.adapters.lower.base import Base
from server.adapters.lower.classifier import MAX_LABELS, head_labels
from server.adapters.lower.method import Method, Rule, boolean, no_effect, only, optional
from server.adapters.lower.source import Source

MAX_LAYERS = 4


def _labels(value: Any) -> str | None:
    fits = isinstance(value, list) and 0 < len(value) <= MAX_LABELS and all(isinstance(item, str) for item in value)
    return None if fits else f"a list of 1 to {MAX_LABELS} texts"


def lower(source: Source, base: Base) -> Program:
    """``logits = W_n act(… act(W_0 pooled + b_0) …) + b_n``."""
    config = source.config
    layers: list[HeadLayer] = []
    width = base.spec.hidden_size
    while f"{len(layers)}.weight" in source.shared and len(layers) < MAX_LAYERS:
        name = str(len(layers))
        weight = source.take_shared(f"{name}.weight", (None, width))
        bias = source.take_shared(f"{name}.bias", None if weight is None else (weight.shape[0],))
        if weight is None:
            return Program()
        layers.append(HeadLayer(weight, bias, str(config.get("activation") or "relu")))
        width = weight.shape[0]
    if not layers:
        source.fault("missing_tensor", "0.weight", f"a probe has layers 0 to at most {MAX_LAYERS - 1}")
        return Program()
    layers[-1].activation = "linear"
    labels = head_labels(source, width, config.get("labels") or ())
    pooling: Pooling = config.get("pooling") or ("mean" if base.spec.is_encoder else "last")
    return Program(head=TaskHead(pooling, layers, labels, multi_label=bool(config.get("multi_label")) or width == 1))


_FIELDS: dict[str, Rule] = {
    "medley_type": no_effect,
    "pooling": only("first", "last", "mean", "none", None),
    "activation": only("tanh", "relu", "gelu", "linear", None),
    "labels": optional(_labels),
    "multi_label": optional(boolean),
    "base_model_name_or_path": no_effect,
}
METHOD = Method(
    name="PROBE",
    summary="a linear or MLP classifier on pooled hidden states of the frozen base",
    fields=_FIELDS,
    lower=lower,
)
