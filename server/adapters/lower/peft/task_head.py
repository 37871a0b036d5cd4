"""Classifiers that PEFT trains beside any method: ``task_type`` SEQ_CLS and TOKEN_CLS, on decoders and encoders.

Formulas: transformers' ``*ForSequenceClassification`` and ``*ForTokenClassification``, whose layers ``classifier`` knows.
"""

from __future__ import annotations

from torch import Tensor

from server.adapters.ir import Program, TaskHead
from server.adapters.lower.base import Base
from server.adapters.lower.classifier import CLASSES, class_layers, head_labels, reads_pooler
from server.adapters.lower.peft.lora import scaling
from server.adapters.lower.source import Source

_WITHOUT_HEAD = (None, "", "CAUSAL_LM", "FEATURE_EXTRACTION")


def lower_task_head(source: Source, base: Base, program: Program) -> None:
    """The checkpoint's classifier, if it has one, as the program's head. Takes every tensor that belongs to it."""
    task = _task(source)
    if task in _WITHOUT_HEAD:
        return
    if task not in CLASSES.values():
        source.field_fault("task_type", "this task is not served", "CAUSAL_LM, SEQ_CLS, TOKEN_CLS or FEATURE_EXTRACTION")
        return
    if program.invocation_tokens:
        source.field_fault("alora_invocation_tokens", "a classifier reads every prompt, also one without these tokens", "null")
        return
    change = _pooler_change(source, base) if reads_pooler(base, task) else None
    layers, pooling = class_layers(source, base, task)
    if layers is None:
        return
    if change is not None:
        layers[0].weight = layers[0].weight.to(base.compute) + change
    count = int(layers[-1].weight.shape[0])
    labels = head_labels(source, count)
    # transformers' pipelines read a single logit as a label of its own, not as one of one.
    program.head = TaskHead(pooling, layers, labels, multi_label=count == 1)


def _task(source: Source) -> object:
    """``task_type``, or where it is null the class of the model that was wrapped."""
    task = source.config.get("task_type")
    if task not in (None, ""):
        return task
    mapping = source.config.get("auto_mapping")
    wrapped = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return next((kind for end, kind in CLASSES.items() if isinstance(wrapped, str) and wrapped.endswith(end)), None)


def _pooler_change(source: Source, base: Base) -> Tensor | None:
    """``s B A`` where LoRA was trained on the pooler too (``all-linear`` takes it in). Anything more stays unused, which is a fault."""
    name, hidden = base.spec.names.pooler, base.spec.hidden_size
    paths = (base.spec.backbone_prefix + name, name)
    path = next((path for path in paths if f"{path}.lora_A.weight" in source.shared), None)
    if path is None or f"{path}.weight" in source.shared:
        return None
    if source.config.get("use_dora"):
        source.fault("wrong_module", path, "DoRA on the pooler is not served; leave the pooler out of target_modules")
        return None
    down = source.take_shared(f"{path}.lora_A.weight", (None, hidden))
    up = source.take_shared(f"{path}.lora_B.weight", (hidden, None))
    if down is None or up is None or down.shape[0] != up.shape[1] or not down.shape[0]:
        source.fault("wrong_rank", path, "lora_A and lora_B of one rank are needed")
        return None
    return scaling(source, name, down.shape[0]) * (up.to(base.compute) @ down.to(base.compute))
