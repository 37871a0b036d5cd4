"""Uni-LoRA (Li et al. 2025) as PEFT stores it: every number of every A and B is one of the few numbers of ``theta_d``, scaled.

Which one, and its scale, is stored, or drawn again from ``proj_seed`` for all modules together. Then the checkpoint holds nothing that says
which modules those are: ``target_modules`` does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, boolean, integer, no_effect, only
from server.adapters.lower.peft.wrapped import LINEARS, MAX_RANK, WRAPPED_FIELDS, shared_tensor, tensor_groups, with_saved_modules
from server.adapters.lower.source import Source

_THETA = "unilora_theta_d"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.]{1,256}")


def lower(source: Source, base: Base) -> Program:
    """Low rank: ``A = theta[indices_A] * scales_A``, B the same."""
    program = Program()
    theta = shared_tensor(source, _THETA, (source.config.get("theta_d_length", 256),))
    if theta is None:
        return program
    theta = theta.to(base.compute)
    matrices = _stored if source.config.get("save_indices", False) else _drawn
    for spec, first, second in matrices(source, base, theta):
        edit = program.linear(spec.name)
        edit.down, edit.up = first, second.T
    return with_saved_modules(source, base, program)


def _stored(source: Source, base: Base, theta: Tensor) -> Iterator[tuple[SiteSpec, Tensor, Tensor]]:
    """A ``(r, in)`` and B ``(out, r)`` of every module, from stored indices."""
    shapes = {f"unilora_{kind}_A": ("r", "in") for kind in ("indices", "scales")}
    shapes |= {f"unilora_{kind}_B": ("out", "r") for kind in ("indices", "scales")}
    integers = frozenset({"unilora_indices_A", "unilora_indices_B"})
    for group in tensor_groups(source, base, "unilora_", shapes, integers=integers):
        indices = [group["unilora_indices_A"], group["unilora_indices_B"]]
        if any(int(index.min()) < 0 or int(index.max()) >= theta.numel() for index in indices):
            source.fault("wrong_shape", group.site, f"an index is outside {_THETA}", f"below {theta.numel()}")
            continue
        yield group.spec, theta[indices[0]] * group["unilora_scales_A"], theta[indices[1]] * group["unilora_scales_B"]


def _drawn(source: Source, base: Base, theta: Tensor) -> Iterator[tuple[SiteSpec, Tensor, Tensor]]:
    """The same, drawn as PEFT does: every index as often as any other, or once more, shuffled; a scale is ``1 / sqrt`` of how often."""
    rank, length = source.config.get("r", 4), theta.numel()
    specs = _targeted(source, base)
    total = sum(rank * (spec.in_features + spec.out_features) for spec in specs)
    source.reserve(total)
    generator = np.random.default_rng(source.config.get("proj_seed", 42))
    drawn = np.repeat(np.arange(length), total // length)
    if total % length:
        drawn = np.concatenate([drawn, generator.choice(length, size=total % length, replace=False)])
    generator.shuffle(drawn)
    indices = torch.from_numpy(drawn)
    scaled = theta * torch.bincount(indices, minlength=length).to(theta.dtype).clamp(min=1.0).rsqrt()
    numbers = scaled[indices]
    start = 0
    for spec in specs:
        middle = start + rank * spec.in_features
        end = middle + rank * spec.out_features
        yield spec, numbers[start:middle].view(rank, -1), numbers[middle:end].view(-1, rank)
        start = end


def _targeted(source: Source, base: Base) -> list[SiteSpec]:
    """The linears that ``target_modules`` and ``layers_to_transform`` name, in the base's order, by PEFT's rule for lists of names.

    PEFT reads the names in ``modules_to_save`` as regular expressions, which are never run here; what they name is no target.
    """
    layers: Any = source.config.get("layers_to_transform")
    names: Any = source.config.get("target_modules")
    saved: Any = source.config.get("modules_to_save") or []
    for field, value in (("target_modules", names), ("modules_to_save", saved)):
        if not isinstance(value, list) or not all(isinstance(name, str) and _PLAIN_NAME.fullmatch(name) for name in value):
            source.field_fault(
                field, "without stored indices, the config must say which modules are meant", "a list of plain names"
            )
            return []
    chosen = [
        spec
        for spec in base.spec.sites
        if spec.kind in LINEARS
        and any(f".{spec.name}".endswith(f".{name}") for name in names)
        and not any(f".{name}." in f".{spec.name}." for name in saved)
    ]
    if layers in (None, []):
        return chosen
    wanted = layers if isinstance(layers, list) else [layers]
    return [spec for spec in chosen if spec.name in names or spec.layer in wanted]


def _no_pattern(value: Any) -> str | None:
    """``layers_pattern`` would say which number in a name is the layer's; these bases have but one."""
    return None if value in (None, [], "", "layers", "h", ["layers"], ["h"]) else "layers or h, or nothing"


METHOD = Method(
    name="UNILORA",
    summary="low rank, from few shared numbers; which ones as stored, or drawn again from the seed",
    fields={
        **WRAPPED_FIELDS,
        "r": integer(1, MAX_RANK),
        "proj_seed": integer(0, 2**63 - 1),
        "theta_d_length": integer(1, 1 << 28),
        "save_indices": boolean,
        "layers_pattern": _no_pattern,
        "exclude_modules": only(None),
        "unilora_dropout": no_effect,
        "init_theta_d_bound": no_effect,
    },
    lower=lower,
)
