"""What AdapterHub saves beside an adapter as its head: a classifier over an encoder, or a causal model's own output head.

A classifier is a chain ``[dropout, linear, act] * (layers - 1), dropout, linear`` over the first token's or every token's last hidden state;
the indices of its linears are in their keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from server.adapters.ir import HeadEdit, HeadLayer, Pooling, Program, TaskHead
from server.adapters.lower.adapterhub import ENVELOPE, activation, activation_name, options
from server.adapters.lower.base import Base
from server.adapters.lower.method import Rule, boolean, integer, no_effect, only, optional
from server.adapters.lower.source import Source
from server.adapters.lower.task_head import head_labels

_FILE = "head_config.json"
_MAX_LAYERS = 16
_POOLING: dict[str, Pooling] = {"classification": "first", "multilabel_classification": "first", "tagging": "none"}


def _labels(value: Any) -> str | None:
    fits = isinstance(value, dict) and len(value) <= 65536 and all(type(index) is int for index in value.values())
    return None if fits else "an object of label names and their indices"


_FIELDS: dict[str, Rule] = {
    "head_type": only(*_POOLING),
    "num_labels": integer(1, 1 << 20),
    "layers": integer(1, _MAX_LAYERS),
    "activation_function": optional(activation_name),
    "label2id": optional(_labels),
    "use_pooler": optional(boolean),
    "bias": boolean,
    "dropout_prob": no_effect,
}
_ENVELOPE: dict[str, Rule] = {**ENVELOPE, **dict.fromkeys(("config", "name", "label2id", "num_labels"), no_effect)}


def lower_head(source: Source, base: Base, program: Program) -> None:
    """The head that was saved with the adapter, if there is one."""
    checkpoint = source.checkpoint.head
    if checkpoint is None:
        return
    head = source.part(checkpoint, _FILE)
    head.check_fields(_ENVELOPE)
    values = head.config.get("config")
    if values is None:
        _lower_own_head(head, base, program)
    else:
        _lower_classifier(source, head, base, program, options(head, values, _FIELDS))
    head.check_all_used()


def _lower_own_head(head: Source, base: Base, program: Program) -> None:
    """A model class with one head of its own: the library always saves it, and it equals the base's unless it was trained."""
    site = base.spec.head
    if not site or not head.has(site, "weight"):
        message = "the head of this model class is not served; use one with flexible heads, or a causal language model"
        head.fault("unsupported_method", _FILE, message, found=repr(head.config.get("model_class"))[:80])
        return
    weight = head.take(site, "weight", (base.spec.vocab_size, base.spec.hidden_size))
    if weight is not None and not torch.equal(weight.to(base.dtype).to(base.compute), base.weight(site)):
        program.add(site, HeadEdit(weight=weight.to(base.compute)))


def _lower_classifier(source: Source, head: Source, base: Base, program: Program, values: Mapping[str, Any]) -> None:
    kind, hidden = values.get("head_type", ""), base.spec.hidden_size
    if kind not in _POOLING or not base.spec.is_encoder:
        head.fault(
            "unsupported_method", f"{_FILE}: config.head_type", "prediction heads are served on encoders", found=repr(kind)
        )
        return
    indices = sorted({int(name.split(".")[1]) for name in head.shared if _is_linear(name)})
    if len(indices) != values.get("layers", len(indices)) or not 0 < len(indices) <= _MAX_LAYERS:
        head.fault("missing_tensor", _FILE, "as many linears as config.layers are needed", found=str(len(indices)))
        return
    act = values.get("activation_function")
    layers = []
    for index in indices:
        is_last = index == indices[-1]
        weight = head.take_shared(f"heads.{index}.weight", (values.get("num_labels") if is_last else hidden, hidden))
        bias = None if weight is None else head.take_shared(f"heads.{index}.bias", (weight.shape[0],))
        if weight is not None:
            name = "linear" if is_last or not act else activation(head, act)
            layers.append(HeadLayer(weight.to(base.compute), None if bias is None else bias.to(base.compute), name))
    if len(layers) == len(indices):
        count = layers[-1].weight.shape[0]
        labels = head_labels(source, count, source.checkpoint.labels or _label_names(values.get("label2id"), count))
        before = [_pooler(head, base)] if values.get("use_pooler") else []
        is_multi = kind == "multilabel_classification" or count == 1
        program.head = TaskHead(_POOLING[kind], [*before, *layers], labels, multi_label=is_multi)


def _pooler(head: Source, base: Base) -> HeadLayer:
    """The base's own linear on the first token, which belongs to neither the adapter nor its head."""
    name, width = base.spec.names.pooler, base.spec.hidden_size
    weight, bias = base.parameter(f"{name}.weight"), base.parameter(f"{name}.bias")
    if not name or weight is None or bias is None:
        head.fault("missing_tensor", f"{_FILE}: config.use_pooler", "the base model has no pooler")
        return HeadLayer(torch.zeros(width, width, dtype=base.compute))
    return HeadLayer(weight, bias, "tanh")


def _is_linear(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 3 and parts[0] == "heads" and parts[1].isascii() and parts[1].isdigit() and len(parts[1]) < 4


def _label_names(label2id: Mapping[str, int] | None, count: int) -> tuple[str, ...]:
    """Names in the order of their indices; none when they do not name every output once."""
    ordered = sorted((label2id or {}).items(), key=lambda item: item[1])
    return tuple(name for name, _ in ordered) if [index for _, index in ordered] == list(range(count)) else ()
