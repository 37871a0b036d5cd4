"""From hidden states to an answer without tokens: pooled rows, across chunks of a prompt, then a classifier or unit length.

Knows rows and a program's head; no scheduler and no model. Each sequence is a function of its own rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from server.adapters.activations import ACTIVATIONS
from server.adapters.packed import TaskHeadLayout
from server.engine.types import TaskResult


@dataclass(frozen=True, slots=True)
class Pooled:
    """What a sequence's rows have come to so far: ``rows (n, hidden)`` out of ``count`` rows seen; a sum where the mean is wanted."""

    rows: Tensor
    count: int


def pool(pooling: str, hidden: Tensor, before: Pooled | None) -> Pooled:
    """Take in the next rows ``(n, hidden)`` of a sequence, ``n > 0``. ``before`` is what earlier chunks gave, and is left as it was."""
    count = hidden.shape[0] + (0 if before is None else before.count)
    if pooling == "first":
        return Pooled(hidden[:1].clone() if before is None else before.rows, count)
    if pooling == "last":
        return Pooled(hidden[-1:].clone(), count)
    if pooling == "mean":
        # Summed in fp64, so that where a prompt was cut does not show.
        total = hidden.double().sum(0, keepdim=True)
        return Pooled(total if before is None else before.rows + total, count)
    return Pooled(hidden.clone() if before is None else torch.cat([before.rows, hidden]), count)


def pooled_rows(pooling: str, pooled: Pooled) -> Tensor:
    """The rows that a classifier reads: ``(1, hidden)``, or every token's without pooling."""
    return pooled.rows / pooled.count if pooling == "mean" else pooled.rows


def embedding(rows: Tensor) -> TaskResult | None:
    """A pooled row at unit length; None when it is not finite, or zero."""
    vector = F.normalize(rows.double(), dim=-1)
    return TaskResult(_floats(vector)) if bool(torch.isfinite(vector).all() and vector.any()) else None


def classification(rows: Tensor, head: TaskHeadLayout, extras: Mapping[str, Tensor]) -> TaskResult | None:
    """The head's layers on every row, in the head's own precision (at least fp32); None when a logit is not finite."""
    x = rows
    for index, activation in enumerate(head.activations):
        weight = extras[f"task_head.{index}.weight"]
        x = ACTIVATIONS[activation](F.linear(x.to(weight.dtype), weight, extras.get(f"task_head.{index}.bias")))
    if not bool(torch.isfinite(x).all()):
        return None
    labels = head.labels or tuple(f"LABEL_{index}" for index in range(x.shape[1]))
    return TaskResult(_floats(x), labels, head.multi_label, per_token=head.pooling == "none")


def _floats(rows: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in rows.tolist())
