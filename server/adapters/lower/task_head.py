"""Classifiers that PEFT trains beside any method: ``task_type`` SEQ_CLS and TOKEN_CLS, on decoders and encoders.

Formulas: transformers' ``*ForSequenceClassification`` and ``*ForTokenClassification``. What such a class reads through that is the base's
own (BERT's pooler) is copied from the base into the head.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from server.adapters.ir import HeadLayer, Pooling, Program, TaskHead
from server.adapters.lower.base import Base
from server.adapters.lower.lora import scaling
from server.adapters.lower.source import Source

MAX_LABELS, MAX_LABEL_LENGTH = 4096, 256
"""Every reply names every label, so that a classifier's size is everybody's business."""
CLASSES = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
_WITHOUT_HEAD = (None, "", "CAUSAL_LM", "FEATURE_EXTRACTION")


def lower_task_head(source: Source, base: Base, program: Program) -> None:
    """The checkpoint's classifier, if it has one, as the program's head. Takes every tensor that belongs to it."""
    task = _task(source)
    if task in _WITHOUT_HEAD:
        return
    if task not in ("SEQ_CLS", "TOKEN_CLS"):
        source.field_fault("task_type", "this task is not served", "CAUSAL_LM, SEQ_CLS, TOKEN_CLS or FEATURE_EXTRACTION")
        return
    if program.invocation_tokens:
        source.field_fault("alora_invocation_tokens", "a classifier reads every prompt, also one without these tokens", "null")
        return
    layers, pooling = class_layers(source, base, task)
    if layers and all(layer is not None for layer in layers):
        found = [layer for layer in layers if layer is not None]
        count = int(found[-1].weight.shape[0])
        labels = head_labels(source, count)
        # transformers' pipelines read a single logit as a label of its own, not as one of one.
        program.head = TaskHead(pooling, found, labels, multi_label=count == 1)


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
    if odd := next((label for label in labels if not (0 < len(label) <= MAX_LABEL_LENGTH and label.isprintable())), None):
        expected = f"1 to {MAX_LABEL_LENGTH} printable characters"
        source.fault("unsupported_field", "labels", "a label cannot be shown", expected, repr(odd)[:80])
    return labels


def _task(source: Source) -> object:
    """``task_type``, or where it is null the class of the model that was wrapped."""
    task = source.config.get("task_type")
    if task not in (None, ""):
        return task
    mapping = source.config.get("auto_mapping")
    wrapped = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return next((kind for end, kind in CLASSES.items() if isinstance(wrapped, str) and wrapped.endswith(end)), None)


def class_layers(source: Source, base: Base, task: str) -> tuple[list[HeadLayer | None], Pooling]:
    """The layers over the backbone in transformers' class for a task; None for one that is recorded as missing or wrong."""
    family, hidden = base.spec.family, base.spec.hidden_size
    if task == "TOKEN_CLS":
        return [_layer(source, _present(source, "classifier", "score"), hidden)], "none"
    if not base.spec.is_encoder:
        return [_layer(source, _present(source, "score", "classifier"), hidden)], "last"
    if family == "roberta":
        dense = _layer(source, "classifier.dense", hidden, square=True, activation="tanh")
        return [dense, _layer(source, "classifier.out_proj", hidden)], "first"
    if family == "distilbert":
        return [_pre_classifier(source, base), _layer(source, "classifier", hidden)], "first"
    return [_pooler(source, base), _layer(source, "classifier", hidden)], "first"


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
    """BERT's pooler, a linear on the first token with tanh: the checkpoint's where it replaces it, else the base's, with its low rank."""
    name, hidden = base.spec.names.pooler, base.spec.hidden_size
    stored = next((key for prefix in (base.spec.backbone_prefix, "") if f"{(key := prefix + name)}.weight" in source.shared), "")
    if stored:
        return _layer(source, stored, hidden, square=True, activation="tanh")
    weight, bias = base.parameter(f"{name}.weight"), _bias(source, base, name)
    if weight is None or bias is None:
        source.fault(
            "missing_tensor",
            f"{name}.weight",
            "the base model has no pooler, so that the classifier was trained on a random one; add `pooler` to modules_to_save",
        )
        return None
    return HeadLayer(_with_low_rank(source, base, name, weight), bias, "tanh")


def _bias(source: Source, base: Base, name: str) -> Tensor | None:
    """The base's bias, or the one that was trained in its place (``bias="all"``; of a module with LoRA ``"lora_only"``)."""
    for prefix in (base.spec.backbone_prefix, ""):
        for tail in ("bias", "base_layer.bias"):
            if (key := f"{prefix}{name}.{tail}") in source.shared:
                return source.take_shared(key, (base.spec.hidden_size,))
    return base.parameter(f"{name}.bias")


def _with_low_rank(source: Source, base: Base, name: str, weight: Tensor) -> Tensor:
    """``W + s B A`` where LoRA was trained on the pooler too (``all-linear`` takes it in). Anything more stays unused, which is a fault."""
    hidden = base.spec.hidden_size
    for path in (base.spec.backbone_prefix + name, name):
        if f"{path}.lora_A.weight" not in source.shared:
            continue
        if source.config.get("use_dora"):
            source.fault("wrong_module", path, "DoRA on the pooler is not served; leave the pooler out of target_modules")
            return weight
        down = source.take_shared(f"{path}.lora_A.weight", (None, hidden))
        up = source.take_shared(f"{path}.lora_B.weight", (hidden, None))
        if down is None or up is None or down.shape[0] != up.shape[1] or not down.shape[0]:
            source.fault("wrong_rank", path, "lora_A and lora_B of one rank are needed")
            return weight
        return weight + scaling(source, name, down.shape[0]) * (up.to(base.compute) @ down.to(base.compute))
    return weight


def _pre_classifier(source: Source, base: Base) -> HeadLayer | None:
    """DistilBERT's linear before the classifier. PEFT does not save it by itself, so that the base must have it, or it is lost."""
    if "pre_classifier.weight" in source.shared:
        return _layer(source, "pre_classifier", base.spec.hidden_size, square=True, activation="relu")
    weight, bias = base.parameter("pre_classifier.weight"), _bias(source, base, "pre_classifier")
    if weight is None or bias is None:
        source.fault(
            "missing_tensor",
            "pre_classifier.weight",
            'neither the checkpoint nor the base has it; train with modules_to_save=["pre_classifier", "classifier"]',
        )
        return None
    return HeadLayer(weight, bias, "relu")
