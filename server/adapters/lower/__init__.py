"""Lowering: from a checkpoint's config and tensors to a program.

A package for each library that writes checkpoints, in it a file for each method; what they share is here. A method is added by adding a
module that defines ``METHOD`` (a ``Method``) to its library's package; nothing else changes. Everything is driven by tensor keys: the config
supplies scalars and meaning, never module patterns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.ir import VECTORS, HeadLayer, Program
from server.adapters.lower.adapterhub.head import lower_head
from server.adapters.lower.base import Base
from server.adapters.lower.check import check_program
from server.adapters.lower.checkpoint import Checkpoint
from server.adapters.lower.method import Method
from server.adapters.lower.peft.task_head import lower_task_head
from server.adapters.lower.registry import REFUSED, method_of, methods
from server.adapters.lower.source import Source

MAX_PROGRAM_BYTES = 1 << 30

__all__ = ["REFUSED", "Checkpoint", "Method", "cast", "lower", "method_of", "methods"]


def lower(checkpoint: Checkpoint, base: Base, *, max_bytes: int = MAX_PROGRAM_BYTES) -> Program:
    """Lower a checkpoint onto the base. Raises LoweringError with every fault found."""
    method = method_of(checkpoint)
    source = Source(checkpoint, base.spec, max_bytes // base.dtype.itemsize, method.file)
    source.check_fields(method.fields)
    source.stop_if_faulty()
    program = method.lower(source, base)
    _lower_head(source, base, program)
    source.check_all_used()
    source.stop_if_faulty()
    program = cast(program, base)
    check_program(source, base, program, max_bytes)
    source.stop_if_faulty()
    return program


def _lower_head(source: Source, base: Base, program: Program) -> None:
    """What the library saves of heads, whatever the method beside them."""
    library = source.checkpoint.library
    if library == "peft":
        lower_task_head(source, base, program)
    if library == "adapters":
        lower_head(source, base, program)
    elif source.checkpoint.head is not None:
        source.fault("unused_tensor", "model_head.safetensors", "only AdapterHub's adapters have their head in a file of its own")
    if source.checkpoint.labels and program.head is None:
        source.fault(
            "unsupported_field", "labels.json", "the adapter has no classifier that these could name; leave the file out"
        )


def cast(program: Program, base: Base) -> Program:
    """Matrices to the base's dtype; scales, shifts and other vectors stay at least fp32."""
    wide = torch.promote_types(base.dtype, torch.float32)
    cast: dict[tuple[int, torch.dtype], Tensor] = {}
    for _, owner, name, tensor in list(program.tensors()):
        if tensor.is_floating_point():
            dtype = wide if name in VECTORS or isinstance(owner, HeadLayer) else base.dtype
            # What stands at two places (a table of a tied embedding and head) stays one tensor.
            if (id(tensor), dtype) not in cast:
                cast[id(tensor), dtype] = tensor.to(dtype).contiguous()
            setattr(owner, name, cast[id(tensor), dtype])
    return program
