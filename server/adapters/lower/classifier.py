"""Classifiers as transformers' classes have them: which layers stand over the backbone, and what their outputs are called.

Formulas: transformers' ``*ForSequenceClassification`` and ``*ForTokenClassification``. What such a class reads through that is the base's
own (BERT's pooler) is copied from the base into the head.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from server.adapters.ir import HeadLayer, Pooling
from server.adapters.lower.base import Base
from server.adapters.lower.source import Source

MAX_LABELS, MAX_LABEL_LENGTH = 4096, 256
"""Every reply names every label, so that a classifier's size is everybody's business."""
CLASSES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
"""How a class's name ends, and the task that it is for."""


def head_labels(source: Source, count: int, given: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of a classifier's outputs: those that came with the checkpoint, else LABEL_0 and so on, as transformers has it."""
    if not 0 < count <= MAX_LABELS:
        source.fault("wrong_shape", "labels", "this classifier has too few or too many outputs", f"1 to {MAX_LABELS}", str(count))
        return ()
    labels = tuple(given) or tuple(source.checkpoint.labels) or tuple(f"LABEL_{index}" for index in range(count))
    if source.checkpoint.labels and labels != tuple(source.checkpoint.labels):
        source.fault("unsupported_field", "labels.json", "the config names the outputs too, and differently; leave one out")
    if len(labels) != count:
        source.fault("wrong_shape", "labels", "the classifier needs one label an output", str(count), str(len(labels)))
    elif len(set(labels)) != count:
        source.fault("unsupported_field", "labels", "labels must be distinct")
    odd = [label for label in labels if not (0 < len(label) <= MAX_LABEL_LENGTH and label.isprintable())]
    if odd:
        expected = f"1 to {MAX_LABEL_LENGTH} printable characters"
        source.fault("unsupported_field", "labels", "a label cannot be shown", expected, repr(odd[0])[:80])
    return labels


def class_layers(source: Source, base: Base, task: object) -> tuple[list[HeadLayer] | None, Pooling]:
    """The layers over the backbone in transformers' class for a task; None, with the faults recorded, when one is missing or wrong."""
    layers, pooling = _layers(source, base, task)
    found = [layer for layer in layers if layer is not None]
    return (found if len(found) == len(layers) else None), pooling


def base_pooler(base: Base) -> HeadLayer | None:
    """The base's own linear on the first token, with tanh; None where it has none."""
    name = base.spec.names.pooler
    weight, bias = base.parameter(f"{name}.weight"), base.parameter(f"{name}.bias")
    return None if not name or weight is None or bias is None else HeadLayer(weight, bias, "tanh")


def reads_pooler(base: Base, task: object) -> bool:
    """Whether the class for the task reads the first token through the backbone's pooler, its first layer then."""
    return task == "SEQ_CLS" and base.spec.is_encoder and base.spec.family not in ("roberta", "distilbert")


def _layers(source: Source, base: Base, task: object) -> tuple[list[HeadLayer | None], Pooling]:
    hidden = base.spec.hidden_size
    if task == "TOKEN_CLS":
        return [_layer(source, _present(source, "classifier", "score"), hidden)], "none"
    if not base.spec.is_encoder:
        return [_layer(source, _present(source, "score", "classifier"), hidden)], "last"
    if reads_pooler(base, task):
        return [_pooler(source, base), _layer(source, "classifier", hidden)], "first"
    if base.spec.family == "roberta":
        dense = _layer(source, "classifier.dense", hidden, square=True, activation="tanh")
        return [dense, _layer(source, "classifier.out_proj", hidden)], "first"
    return [_pre_classifier(source, base), _layer(source, "classifier", hidden)], "first"


def _present(source: Source, *names: str) -> str:
    """The first of these modules that the checkpoint has a weight for."""
    return next((name for name in names if f"{name}.weight" in source.shared), names[0])


def _layer(source: Source, name: str, hidden: int, *, square: bool = False, activation: str = "linear") -> HeadLayer | None:
    if f"{name}.weight" not in source.shared:
        source.fault(
            "missing_tensor",
            f"{name}.weight",
            "the classifier is not in the checkpoint; train and save it with the adapter (modules_to_save)",
        )
        return None
    weight = source.take_shared(f"{name}.weight", (hidden if square else None, hidden))
    if weight is None:
        return None
    bias = source.take_shared(f"{name}.bias", (weight.shape[0],))
    return HeadLayer(weight, bias, activation)


def _pooler(source: Source, base: Base) -> HeadLayer | None:
    """BERT's pooler, a linear on the first token with tanh: the checkpoint's where it replaces it, else the base's."""
    name, hidden = base.spec.names.pooler, base.spec.hidden_size
    stored = next((key for prefix in (base.spec.backbone_prefix, "") if f"{(key := prefix + name)}.weight" in source.shared), "")
    if stored:
        return _layer(source, stored, hidden, square=True, activation="tanh")
    pooler = base_pooler(base)
    if pooler is None:
        source.fault(
            "missing_tensor",
            f"{name}.weight",
            "the base model has no pooler, so that the classifier was trained on a random one; add `pooler` to modules_to_save",
        )
        return None
    trained = _trained_bias(source, base, name)
    return pooler if trained is None else HeadLayer(pooler.weight, trained, pooler.activation)


def _trained_bias(source: Source, base: Base, name: str) -> Tensor | None:
    """The bias that was trained in place of the base's (``bias="all"``; of a module with LoRA ``"lora_only"``), if there is one."""
    for prefix in (base.spec.backbone_prefix, ""):
        for tail in ("bias", "base_layer.bias"):
            if (key := f"{prefix}{name}.{tail}") in source.shared:
                return source.take_shared(key, (base.spec.hidden_size,))
    return None


def _pre_classifier(source: Source, base: Base) -> HeadLayer | None:
    """DistilBERT's linear before the classifier. PEFT does not save it by itself, so that the base must have it, or it is lost."""
    if "pre_classifier.weight" in source.shared:
        return _layer(source, "pre_classifier", base.spec.hidden_size, square=True, activation="relu")
    weight, bias = base.parameter("pre_classifier.weight"), base.parameter("pre_classifier.bias")
    trained = _trained_bias(source, base, "pre_classifier")
    bias = bias if trained is None else trained
    if weight is None or bias is None:
        source.fault(
            "missing_tensor",
            "pre_classifier.weight",
            'neither the checkpoint nor the base has it; train with modules_to_save=["pre_classifier", "classifier"]',
        )
        return None
    return HeadLayer(weight, bias, "relu")
