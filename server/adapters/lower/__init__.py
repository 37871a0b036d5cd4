"""Lowering: from a checkpoint's config and tensors to a program. One file per method; this one finds them and checks the result.

A method is added by adding a module here that defines ``METHOD`` (a ``Method``); nothing else changes. Everything is driven by
tensor keys: the config supplies scalars and meaning, never module patterns.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from server.adapters.faults import Fault, LoweringError
from server.adapters.ir import HeadEdit, LinearEdit, Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method
from server.adapters.lower.source import Source

MAX_PROGRAM_BYTES = 1 << 30

REFUSED = {
    "XLORA": "its gates mix adapters by each token's hidden states in two passes",
    "LILY": "its router averages over all tokens of the batch, so that a neighbour would change the result",
    "SHADOW": "it runs a second model beside the base",
    "ADAMSS": "its segments are not stored in the checkpoint",
}
"""Methods that no program can express, with the reason."""

__all__ = ["Method", "lower", "methods"]


@cache
def methods() -> Mapping[str, Method]:
    """Every method by its name in checkpoints (PEFT's ``peft_type``)."""
    found: dict[str, Method] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda item: item.name):
        method = getattr(importlib.import_module(f"{__name__}.{info.name}"), "METHOD", None)
        if isinstance(method, Method):
            found[method.name] = method
    return found


def lower(config: Mapping[str, Any], tensors: Mapping[str, Tensor], base: Base, *, max_bytes: int = MAX_PROGRAM_BYTES) -> Program:
    """Lower a checkpoint onto the base. Raises LoweringError with every fault found."""
    method = _method(config)
    source = Source(config, tensors, base.spec)
    source.check_fields(method.fields)
    source.stop_if_faulty()
    program = method.lower(source, base)
    source.check_all_used()
    source.stop_if_faulty()
    program = _cast(program, base)
    _check(program, source, base, max_bytes)
    source.stop_if_faulty()
    return program


def _method(config: Mapping[str, Any]) -> Method:
    name = config.get("peft_type")
    known = methods()
    if isinstance(name, str) and name in known:
        return known[name]
    supported = f"supported: {', '.join(sorted(known))}"
    where = "adapter_config.json: peft_type"
    if not isinstance(name, str):
        raise LoweringError(
            [Fault("unsupported_method", where, f"the config names no PEFT method; {supported}", found=repr(name)[:80])]
        )
    if name in REFUSED:
        raise LoweringError(
            [Fault("unsupported_method", where, f"{name} cannot be served per request: {REFUSED[name]}", found=name)]
        )
    raise LoweringError([Fault("unsupported_method", where, f"this method is not served here; {supported}", found=name[:80])])


def _cast(program: Program, base: Base) -> Program:
    """Matrices to the base's dtype; scales and shifts stay at least fp32."""
    wide = torch.promote_types(base.dtype, torch.float32)
    for _, edit, name, tensor in list(program.tensors()):
        if tensor.is_floating_point():
            is_vector = name in ("in_scale", "out_scale", "shift")
            setattr(edit, name, tensor.to(wide if is_vector else base.dtype).contiguous())
    return program


def _check(program: Program, source: Source, base: Base, max_bytes: int) -> None:
    if not program.edits:
        source.fault("empty_adapter", "adapter_model.safetensors", "the adapter changes no module of this base model")
    if (where := program.first_non_finite()) is not None:
        source.fault(
            "non_finite", where, f"the edit overflows in {base.spec.dtype}; scale the adapter down or serve the base in float32"
        )
    if program.nbytes > max_bytes:
        source.fault(
            "program_too_large",
            "adapter",
            "the lowered adapter is too large",
            f"at most {max_bytes} bytes",
            f"{program.nbytes} bytes",
        )
    sites = base.spec.by_name()
    for site, edits in program.edits.items():
        spec = sites[site]
        for edit in edits:
            shapes: dict[str, tuple[int, ...]] = {}
            if isinstance(edit, LinearEdit):
                rank, size_in, size_out = edit.rank, spec.in_features, spec.out_features
                shapes = {"down": (rank, size_in), "up": (rank, size_out), "in_scale": (size_in,), "out_scale": (size_out,)}
                shapes |= {"shift": (size_out,), "dense": (size_out, size_in)}
            elif isinstance(edit, HeadEdit):
                shapes = {"weight": (spec.out_features, spec.in_features)}
            for name, shape in shapes.items():
                tensor = getattr(edit, name)
                if tensor is not None and tuple(tensor.shape) != shape:
                    source.fault(
                        "wrong_shape",
                        f"{site}.{name}",
                        "the lowered edit does not fit the base",
                        str(shape),
                        str(tuple(tensor.shape)),
                    )
