"""Lowering: from a checkpoint's config and tensors to a program. One file per method; this one finds them and checks the result.

A method is added by adding a module here that defines ``METHOD`` (a ``Method``); nothing else changes. Everything is driven by
tensor keys: the config supplies scalars and meaning, never module patterns.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.faults import Fault, LoweringError
from server.adapters.ir import VECTORS, BottleneckEdit, HeadEdit, HeadLayer, LinearEdit, Program
from server.adapters.lower.adapterhub_head import lower_head
from server.adapters.lower.base import Base
from server.adapters.lower.checkpoint import Checkpoint
from server.adapters.lower.method import Method
from server.adapters.lower.source import Source
from server.adapters.lower.task_head import lower_task_head

MAX_PROGRAM_BYTES = 1 << 30

REFUSED = {
    "XLORA": "its gates mix adapters by each token's hidden states in two passes",
    "LILY": "its router averages over all tokens of the batch, so that a neighbour would change the result",
    "PSOFT": "it rotates singular vectors of the base that are not stored, and whose signs differ from machine to machine",
    "SHADOW": "it runs a second model beside the base",
    "ADAMSS": "its segments are not stored in the checkpoint",
}
"""Methods that no program can express, with the reason."""

__all__ = ["Checkpoint", "Method", "cast", "lower", "method_of", "methods"]


@cache
def methods() -> Mapping[tuple[str, str], Method]:
    """Every method by (library, its name there)."""
    found: dict[tuple[str, str], Method] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda item: item.name):
        method = getattr(importlib.import_module(f"{__name__}.{info.name}"), "METHOD", None)
        if isinstance(method, Method):
            found[method.library, method.name] = method
    return found


def lower(checkpoint: Checkpoint, base: Base, *, max_bytes: int = MAX_PROGRAM_BYTES) -> Program:
    """Lower a checkpoint onto the base. Raises LoweringError with every fault found."""
    method = method_of(checkpoint)
    source = Source(checkpoint, base.spec, max_bytes // base.dtype.itemsize, method.file)
    source.check_fields(method.fields)
    source.stop_if_faulty()
    program = method.lower(source, base)
    _lower_head(source, base, program, method.library)
    source.check_all_used()
    source.stop_if_faulty()
    program = cast(program, base)
    _check(program, source, base, max_bytes)
    source.stop_if_faulty()
    return program


def _lower_head(source: Source, base: Base, program: Program, library: str) -> None:
    """What the library saves of heads, whatever the method beside them."""
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


def method_of(checkpoint: Checkpoint) -> Method:
    """The method that wrote a checkpoint. Raises LoweringError when it is not served, with the reason."""
    library, field = checkpoint.library, _NAME_FIELDS.get(checkpoint.library, "peft_type")
    name = _name(checkpoint)
    known = methods()
    if (library, name) in known:
        return known[library, name]
    supported = f"supported: {', '.join(sorted(method for owner, method in known if owner == (library or 'peft')))}"
    where = f"adapter_config.json: {field}"
    if not name:
        message = f"the config names no method; {supported}"
    elif name in REFUSED:
        message = f"{name} cannot be served per request: {REFUSED[name]}"
    else:
        message = f"this method is not served here; {supported}"
    raise LoweringError([Fault("unsupported_method", where, message, found=repr(name)[:80])])


_NAME_FIELDS = {"peft": "peft_type", "medley": "medley_type", "adapters": "config.architecture"}


def _name(checkpoint: Checkpoint) -> str:
    """The method's name in its library; AdapterHub leaves out the architecture of bottlenecks and of fusions, which have fields of their own."""
    if checkpoint.library != "adapters":
        name = checkpoint.config.get(_NAME_FIELDS.get(checkpoint.library, ""))
        return name if isinstance(name, str) else ""
    inner = checkpoint.config.get("config")
    inner = inner if isinstance(inner, dict) else {}
    return str(inner.get("architecture") or ("fusion" if "query_before_ln" in inner else "bottleneck"))


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


def _check(program: Program, source: Source, base: Base, max_bytes: int) -> None:
    if program.is_empty:
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
    _check_prologue(program, source, base)
    sites = base.spec.by_name()
    for site, owner, name, tensor in program.tensors():
        shape = _shapes(owner, sites[site]).get(name) if site in sites else None
        if shape is not None and tuple(tensor.shape) != shape:
            source.fault(
                "wrong_shape", f"{site}.{name}", "the lowered edit does not fit the base", str(shape), str(tuple(tensor.shape))
            )


def _check_prologue(program: Program, source: Source, base: Base) -> None:
    spec, prologue = base.spec, program.prologue
    if len(prologue) and len(prologue) >= spec.max_positions:
        found = f"{len(prologue)} virtual tokens"
        source.fault("program_too_large", "adapter", "no room is left for a prompt", f"fewer than {spec.max_positions}", found)
    if len(prologue) and program.invocation_tokens:
        source.fault(
            "unsupported_field", "adapter", "virtual tokens or a prefix, in a program that acts only from tokens of the prompt on"
        )
    if prologue.after_first and not spec.is_encoder:
        source.fault(
            "unsupported_field",
            "adapter",
            "virtual tokens behind the first token cannot be shared by requests that generate; train them in front of the prompt",
        )


def _shapes(owner: object, spec: SiteSpec) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an edit whose shape the site decides."""
    size_in, size_out = spec.in_features, spec.out_features
    if isinstance(owner, LinearEdit):
        outputs = dict.fromkeys(("out_scale", "shift", "pair_scale"), (size_out,))
        return {
            "down": (owner.rank, size_in),
            "up": (owner.rank, size_out),
            "in_scale": (size_in,),
            "dense": (size_out, size_in),
            **outputs,
        }
    if isinstance(owner, HeadEdit):
        return {"weight": (size_out, size_in)}
    if isinstance(owner, BottleneckEdit):
        rank, vectors = owner.rank, ("up_bias", "before_weight", "before_bias", "after_weight", "after_bias")
        return {"down": (rank, size_out), "up": (rank, size_out), "down_bias": (rank,), **dict.fromkeys(vectors, (size_out,))}
    return {}
