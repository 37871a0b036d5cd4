"""Multitask prompt tuning (Wang et al. 2023) as PEFT stores it: shared virtual tokens times a low-rank matrix of the task."""

from __future__ import annotations

from torch import Tensor

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, integer, no_effect, optional
from server.adapters.lower.peft.prompt_tuning import METHOD as PROMPT_TUNING
from server.adapters.lower.peft.replaced import lower_replaced_modules
from server.adapters.lower.peft.virtual_tokens import lower_tokens
from server.adapters.lower.source import Source

_COUNT = optional(integer(1, 1 << 16))


def lower(source: Source, base: Base) -> Program:
    """``prompt * (cols[t] @ rows[t])`` with ``cols (tasks, P, ranks)`` and ``rows (tasks, ranks, hidden)``.

    PEFT is told the task by every request. Here an adapter is one task: the only one, or that of the config field ``medley_task``.
    """
    program = Program(prologue=lower_tokens(source, base))
    cols = source.take_shared("prefix_task_cols", (None, len(program.prologue), None))
    rows = source.take_shared("prefix_task_rows", (None, None, base.spec.hidden_size))
    if cols is None or rows is None:
        source.fault("missing_tensor", "prefix_task_cols, prefix_task_rows", "the task's matrices are missing or do not fit")
    elif cols.shape[0] != rows.shape[0] or cols.shape[2] != rows.shape[1] or not rows.numel():
        shapes = f"{tuple(cols.shape)}, {tuple(rows.shape)}"
        source.fault(
            "wrong_shape",
            "prefix_task_cols, prefix_task_rows",
            "the task's matrices disagree on tasks or ranks; save the adapter again",
            "(t, P, r), (t, r, h)",
            shapes,
        )
    elif program.prologue.tokens is not None and (task := _task(source, cols)) is not None:
        program.prologue.tokens = program.prologue.tokens * (cols[task].to(base.compute) @ rows[task].to(base.compute))
    lower_replaced_modules(source, base, program)
    return program


def _task(source: Source, cols: Tensor) -> int | None:
    tasks, chosen = int(cols.shape[0]), source.config.get("medley_task")
    if source.config.get("num_tasks") not in (None, tasks):
        source.field_fault("num_tasks", "tensors and config disagree on the number of tasks", str(tasks))
    elif source.config.get("num_ranks") not in (None, cols.shape[2]):
        source.field_fault("num_ranks", "tensors and config disagree on the rank", str(cols.shape[2]))
    elif chosen is None and tasks > 1:
        message = "requests cannot name a task: push the adapter once for each task, with medley_task in its config"
        source.field_fault("medley_task", message, f"an integer from 0 to {tasks - 1}")
    elif chosen is not None and chosen >= tasks:
        source.field_fault("medley_task", "there is no such task", f"an integer from 0 to {tasks - 1}")
    else:
        return int(chosen or 0)
    return None


METHOD = Method(
    name="MULTITASK_PROMPT_TUNING",
    summary="virtual tokens of one task in front of the prompt; `medley_task` in the config chooses among several",
    fields={
        **PROMPT_TUNING.fields,
        "num_tasks": _COUNT,
        "num_ranks": _COUNT,
        "medley_task": optional(integer(0, 1 << 16)),
        "prompt_tuning_init_state_dict_path": no_effect,
        "prompt_tuning_init_task": no_effect,
    },
    lower=lower,
)
