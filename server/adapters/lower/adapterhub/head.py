"""What AdapterHub saves beside an adapter as its head: a flexible classifier over an encoder, or the one head of a transformers class.

A flexible classifier is a chain ``[dropout, linear, act] * (layers - 1), dropout, linear`` over the first token's or every token's last hidden state;
the indices of its linears are in their keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from server.adapters.ir import HeadEdit, HeadLayer, Pooling, Program, TaskHead
from server.adapters.lower.adapterhub.options import ENVELOPE, activation, activation_name, options
from server.adapters.lower.base import Base
from server.adapters.lower.classifier import CLASSES, MAX_LABELS, base_pooler, class_layers, head_labels
from server.adapters.lower.method import Rule, boolean, integer, no_effect, only, optional
from server.adapters.lower.source import Source

_FILE = "head_config.json"
_MAX_LAYERS = 16
_POOLING: dict[str, Pooling] = {"classification": "first", "multilabel_classification": "first", "tagging": "none"}


def _labels(value: Any) -> str | None:
    fits = isinstance(value, dict) and len(value) <= MAX_LABELS and all(type(index) is int for index in value.values())
    return None if fits else "an object of label names and their indices"


_FIELDS: dict[str, Rule] = {
    "head_type": only(*_POOLING),
    "num_labels": integer(1, MAX_LABELS),
    "layers": integer(1, _MAX_LAYERS),
    "activation_function": optional(activation_name),
    "label2id": optional(_labels),
    "use_pooler": optional(boolean),
    "bias": boolean,
    "dropout_prob": no_effect,
}
_ENVELOPE: dict[str, Rule] = {
    **ENVELOPE,
    "label2id": optional(_labels),
    **dict.fromkeys(("config", "name", "num_labels"), no_effect),
}


def lower_head(source: Source, base: Base, program: Program) -> None:
    """The head that was saved with the adapter, if there is one."""
    checkpoint = source.checkpoint.head
    if checkpoint is None:
        return
    head = source.part(checkpoint, _FILE)
    head.check_fields(_ENVELOPE)
    head.stop_if_faulty()
    values = head.config.get("config")
    if values is None:
        _lower_own_head(source, head, base, program)
    else:
        _lower_classifier(source, head, base, program, options(head, values, _FIELDS))
    head.check_all_used()


def _lower_own_head(source: Source, head: Source, base: Base, program: Program) -> None:
    """A model class with one head of its own: a classifier, or an output head, which equals the base's unless it was trained."""
    site, model_class = base.spec.head, str(head.config.get("model_class"))
    task = next((task for end, task in CLASSES.items() if model_class.endswith(end)), None)
    if task is not None:
        layers, pooling = class_layers(head, base, task)
        if layers is not None:
            _classify(source, program, TaskHead(pooling, layers), head.config.get("label2id"))
    elif site and head.has(site, "weight"):
        weight = head.take(site, "weight", (base.spec.vocab_size, base.spec.hidden_size))
        if weight is not None and not torch.equal(base.as_served(weight), base.weight(site)):
            program.add(site, HeadEdit(weight=weight.to(base.compute)))
    else:
        message = "the head of this model class is not served; a causal language model's and classifiers are"
        head.fault("unsupported_method", f"{_FILE}: model_class", message, found=model_class[:80])


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
    if values.get("use_pooler"):
        # The base's own, which belongs to neither the adapter nor its head.
        pooler = base_pooler(base)
        if pooler is None:
            head.fault(
                "missing_tensor", f"{_FILE}: config.use_pooler", "the base model has no pooler; serve one that was saved with it"
            )
            return
        layers.insert(0, pooler)
    if len(layers) == len(indices) + bool(values.get("use_pooler")):
        is_multi = kind == "multilabel_classification"
        _classify(source, program, TaskHead(_POOLING[kind], layers, multi_label=is_multi), values.get("label2id"))


def _classify(source: Source, program: Program, task_head: TaskHead, label2id: Mapping[str, int] | None) -> None:
    """The program's head with its labels: those of labels.json, else the config's."""
    count = task_head.layers[-1].weight.shape[0]
    task_head.labels = head_labels(source, count, source.checkpoint.labels or _label_names(label2id, count))
    task_head.multi_label |= count == 1
    program.head = task_head


def _is_linear(name: str) -> bool:
    parts = name.split(".")
    return len(parts) == 3 and parts[0] == "heads" and parts[1].isascii() and parts[1].isdigit() and len(parts[1]) < 4


def _label_names(label2id: Mapping[str, int] | None, count: int) -> tuple[str, ...]:
    """Names in the order of their indices; none when they do not name every output once."""
    ordered = sorted((label2id or {}).items(), key=lambda item: item[1])
    return tuple(name for name, _ in ordered) if [index for _, index in ordered] == list(range(count)) else ()
