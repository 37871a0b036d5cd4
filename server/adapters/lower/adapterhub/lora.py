"""LoRA, DoRA, VeRA and (IA)³ as AdapterHub stores them, all in one config class.

``y = W x + b + s * B A x`` with ``s = alpha / r``. DoRA: ``y = g * (W x + b + s * B A x)`` with ``g = m / ||W + B A||``: neither s nor the
bias is where PEFT has it. (IA)³ (``composition_mode`` "scale") multiplies outputs only: ``y = (W x + b) * (alpha * lora_B)``. In VeRA A and
B are shared, and each module has matrices of its own: ``vera_B B vera_D A``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import Program
from server.adapters.lower.adapterhub.options import ENVELOPE, Part, before_1_1, one_config
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, Rule, boolean, integer, no_effect, number, only, optional
from server.adapters.lower.source import Source

_MATRICES = ("q", "k", "v")
_SHARED = ("shared_parameters.lora_A", "shared_parameters.lora_B")


def _attention_matrices(value: Any) -> str | None:
    fits = isinstance(value, list) and 0 < len(value) <= 8 and all(item in _MATRICES for item in value)
    return None if fits else "a list of q, k and v"


_FIELDS: dict[str, Rule] = {
    "architecture": only("lora"),
    "r": integer(1, 4096),
    "alpha": number(-1e6, 1e6),
    "attn_matrices": _attention_matrices,
    "composition_mode": only("add", "scale"),
    "use_dora": optional(boolean),
    # The gate averages over all tokens of the sequence, those to come included.
    "use_gating": only(False, None),
    # Keys say where the matrices are.
    **dict.fromkeys(("selfattn_lora", "intermediate_lora", "output_lora", "leave_out", "vera_d", "vera_b"), no_effect),
    # Initialisation, training and storage only.
    **dict.fromkeys(("dropout", "init_weights", "init_weights_seed", "dtype"), no_effect),
}
_DEFAULTS: dict[str, Any] = {"r": 8, "alpha": 8, "attn_matrices": ["q", "v"], "composition_mode": "add", "use_dora": False}


def _lower(source: Source, base: Base, program: Program, given: Mapping[str, Any]) -> None:
    """The matrices or vectors of one config: every linear that there are tensors for."""
    settings = {**_DEFAULTS, **given}
    if before_1_1(source) and settings["composition_mode"] == "add":
        # Versions before 1.1.0 trained with a scale of 1, whatever alpha said.
        settings["alpha"] = settings["r"]
    shared_down, shared_up = (source.take_shared(name, (None, None)) for name in _SHARED)
    for spec in source.sites("loras.", ("linear",)):
        if settings["composition_mode"] == "scale":
            _lower_scale(source, base, program, spec, settings)
        else:
            pair = _vera_pair(source, base, spec, shared_down, shared_up) or _pair(source, base, spec, settings)
            if pair is not None:
                _lower_pair(source, base, program, spec, *pair, settings)


def _lower_scale(source: Source, base: Base, program: Program, spec: SiteSpec, settings: Mapping[str, Any]) -> None:
    third = spec.out_features // 3
    parts = _groups(base, spec, settings)
    width = third * len(parts) if parts else spec.out_features
    vector = source.take(spec.name, "loras.lora_B", (width, 1))
    if vector is None:
        return
    # The other thirds of a fused linear are multiplied by alpha all the same.
    scale = torch.ones(spec.out_features, dtype=base.compute)
    values = vector[:, 0].to(base.compute)
    if parts:
        for index, part in enumerate(parts):
            scale[part * third : (part + 1) * third] = values[index * third : (index + 1) * third]
    else:
        scale = values
    program.linear(spec.name).out_scale = scale * settings["alpha"]


def _lower_pair(
    source: Source, base: Base, program: Program, spec: SiteSpec, down: Tensor, up: Tensor, settings: Mapping[str, Any]
) -> None:
    """``down (rank, in)``, ``up (rank, out)``, not yet scaled."""
    edit = program.linear(spec.name)
    scaled = up * (settings["alpha"] / settings["r"])
    if settings["use_dora"]:
        magnitude = source.take(spec.name, "loras.m.weight", (spec.out_features, 1))
        if magnitude is None or spec.transposed:
            message = (
                "DoRA needs m.weight, and a base whose weights are stored as nn.Linear's: the library cannot run it otherwise"
            )
            source.fault("unsupported_field", f"{source.file}: config.use_dora", message, found=spec.name)
            return
        norm = torch.linalg.vector_norm(base.weight(spec.name) + up.T @ down, dim=1)
        edit.out_scale = magnitude[:, 0].to(base.compute) / norm
        scaled = scaled * edit.out_scale
    edit.down, edit.up = down, scaled


def _pair(source: Source, base: Base, spec: SiteSpec, settings: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    rank, parts = settings["r"], _groups(base, spec, settings)
    third, count = spec.out_features // 3, max(1, len(parts))
    for tail in ("loras.lora_A", "loras.lora_B"):
        if not source.has(spec.name, tail):
            source.fault(
                "missing_tensor",
                f"{spec.name}.{tail}",
                "one half of the pair is missing; the checkpoint is incomplete, save the adapter again",
            )
    down = source.take(spec.name, "loras.lora_A", (rank * count, spec.in_features))
    up = source.take(spec.name, "loras.lora_B", (third * count if parts else spec.out_features, rank))
    if down is None or up is None:
        return None
    if not parts:
        return down.to(base.compute), up.T.to(base.compute)
    # Group i of A's rows feeds the third of the fused linear that is i-th among the chosen ones.
    source.reserve(rank * count * spec.out_features)
    whole = torch.zeros(rank * count, spec.out_features, dtype=base.compute)
    for index, part in enumerate(parts):
        block = up[index * third : (index + 1) * third].T.to(base.compute)
        whole[index * rank : (index + 1) * rank, part * third : (part + 1) * third] = block
    return down.to(base.compute), whole


def _vera_pair(
    source: Source, base: Base, spec: SiteSpec, shared_down: Tensor | None, shared_up: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """VeRA's shared pair with the module's own matrices multiplied in; None where the module has none."""
    if not source.has(spec.name, "loras.vera_D"):
        return None
    if shared_down is None or shared_up is None or shared_down.shape[1] != spec.in_features:
        source.fault("missing_tensor", spec.name, "VeRA needs shared lora_A and lora_B that fit the module")
        return None
    rank = shared_down.shape[0]
    inner = source.take(spec.name, "loras.vera_D", (rank, rank))
    outer = source.take(spec.name, "loras.vera_B", (spec.out_features, spec.out_features))
    if inner is None or outer is None or tuple(shared_up.shape) != (spec.out_features, rank):
        source.fault("missing_tensor", spec.name, "VeRA needs vera_B and vera_D of the shared matrices' sizes")
        return None
    up = outer.to(base.compute) @ shared_up.to(base.compute) @ inner.to(base.compute)
    return shared_down.to(base.compute), up.T


def _groups(base: Base, spec: SiteSpec, settings: Mapping[str, Any]) -> list[int]:
    """Which thirds of a fused query, key and value linear the adapter has; none for all other linears."""
    names = base.spec.names
    is_fused = names.query == names.key and spec.name.endswith(f".{names.query}")
    return [index for index, name in enumerate(_MATRICES) if name in settings["attn_matrices"]] if is_fused else []


LORAS = Part(_FIELDS, _lower)
METHOD = Method(
    name="lora",
    summary="low rank; DoRA adds an output scale, (IA)³ is one, VeRA's matrices are multiplied out",
    fields=ENVELOPE,
    lower=one_config(LORAS),
)
