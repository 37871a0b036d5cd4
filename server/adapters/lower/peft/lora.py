"""LoRA (Hu et al. 2021) as PEFT stores it, with DoRA, rsLoRA, patterns, biases, replaced modules, token rows and activation points.

Further variants are in ``lora_variants``.

Formulas: docs/PEFT.md, and PEFT 0.21's ``tuners/lora``. ``s = alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``;
``y = base(x) + s * B(A x) [+ s * lora_bias]``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, boolean, integer, no_effect, number, only, optional, token_ids
from server.adapters.lower.peft.lora_variants import (
    block_settings,
    check_combination,
    drop_training_state,
    settings,
    spread_blocks,
    truncate_base,
)
from server.adapters.lower.peft.replaced import lower_token_rows
from server.adapters.lower.peft.wrapped import (
    LINEARS,
    WRAPPED_FIELDS,
    Group,
    Shapes,
    module_alpha,
    module_rank,
    tensor_groups,
    with_saved_modules,
)
from server.adapters.lower.source import Source

PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
REINITS = ("pissa", "olora")


def _init(value: Any) -> str | None:
    """Initialisations that leave the base alone are history; PiSSA and OLoRA took a part out of it, which is put back as rank."""
    fits = any(type(value) is type(item) and value == item for item in (*PLAIN_INITS, *REINITS))
    names = "true, false, gaussian, eva, orthogonal, mica, lora_ga, pissa or olora"
    return None if fits else f"{names} (others changed the base irreproducibly)"


def _indices(value: Any) -> str | None:
    lists = value.values() if isinstance(value, dict) else [value]
    return None if all(token_ids(item) is None for item in lists) else "a list of token ids, or an object of them"


def lower(source: Source, base: Base) -> Program:
    """Everything a PEFT LoRA checkpoint may hold, site by site."""
    program = Program(invocation_tokens=tuple(source.config.get("alora_invocation_tokens") or ()))
    check_combination(source, changes_base=source.config.get("init_lora_weights") in REINITS)
    lower_token_rows(source, base, program, source.config.get("trainable_token_indices"))

    def shapes(spec: SiteSpec) -> Shapes:
        return _shapes(source, spec)

    for group in tensor_groups(source, base, "lora_", shapes, kinds=(*LINEARS, "embedding")):
        drop_training_state(source, group.site)
        if group.spec.kind == "embedding":
            _lower_embedding(source, base, program, group)
        else:
            _lower_linear(source, base, program, group)
    return with_saved_modules(source, base, program)


def scaling(source: Source, site: str, rank: int) -> float:
    """``s`` of one module. The stored rank must be the one that the config gives, or the scale would be a guess."""
    if module_rank(source, site, 8, rank) is None:
        return 0.0
    return module_alpha(source, site, 8, field="lora_alpha") / (math.sqrt(rank) if source.config.get("use_rslora") else rank)


def _shapes(source: Source, spec: SiteSpec) -> Shapes:
    """A and B, and what the options add to them; which of them there is a bias for, only the checkpoint says."""
    if spec.kind == "embedding":
        return {"lora_embedding_A": ("r", "in"), "lora_embedding_B": ("out", "r")}
    shapes: dict[str, tuple[str | int, ...]] = {"lora_A.weight": ("r", "in"), "lora_B.weight": ("out", "r")}
    if source.config.get("use_bdlora"):
        shapes = {"lora_A.weight": ("rows", "columns"), "lora_B.weight": ("out", "width")}
    if source.config.get("kasa_config"):
        shapes["lora_diag"] = ("r",)
    if source.has(spec.name, "lora_B.bias"):
        shapes["lora_B.bias"] = ("out",)
    return shapes


def _lower_linear(source: Source, base: Base, program: Program, group: Group) -> None:
    is_blocks = bool(source.config.get("use_bdlora"))
    pair = spread_blocks(source, group) if is_blocks else (group["lora_A.weight"], group["lora_B.weight"])
    if pair is None:
        return
    down, up = pair
    scale = scaling(source, group.site, down.shape[0])
    up = (up * scale).T
    edit = program.linear(group.site)
    if "lora_B.bias" in group.tensors:
        edit.shift = group["lora_B.bias"] * scale
    if source.config.get("kasa_config"):
        down, up = truncate_base(source, base, group, down, up)
    elif source.config.get("init_lora_weights") in REINITS:
        down, up = _restore_base(source, base, group.spec, down, up, scale)
    if source.has(group.site, "lora_magnitude_vector"):
        down, up = _decompose(source, base, program, group.spec, down, up)
    edit.down, edit.up = down, up


def _decompose(source: Source, base: Base, program: Program, spec: SiteSpec, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """DoRA (Liu et al. 2024): ``g = m / ||W + s BA||`` per output; ``y = base + (g - 1)(base - b) + g s B A x``."""
    magnitude = source.take(spec.name, "lora_magnitude_vector")
    if magnitude is None or magnitude.numel() != spec.out_features:
        source.fault(
            "wrong_shape", f"{spec.name}.lora_magnitude_vector", "one magnitude per output is needed", str(spec.out_features)
        )
        return down, up
    if source.config.get("lora_bias"):
        source.field_fault("lora_bias", "lora_bias together with DoRA is not defined", "false")
        return down, up
    norm = torch.linalg.vector_norm(base.weight(spec.name) + up.T @ down, dim=1)
    gain = magnitude.reshape(-1).to(base.compute) / norm
    edit = program.linear(spec.name)
    edit.out_scale = gain
    bias = base.bias(spec.name)
    if spec.has_bias:
        edit.shift = bias - gain * bias
    return down, up * gain


def _restore_base(source: Source, base: Base, spec: SiteSpec, down: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """PiSSA and OLoRA subtracted ``s B0 A0`` from W at initialisation; the same is subtracted here, as ``r`` more ranks."""
    rank, weight = down.shape[0], base.weight(spec.name)
    if source.config["init_lora_weights"] == "pissa":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        taken_down, taken_up = right[:rank], (left[:, :rank] * values[:rank]).T
    else:
        orthogonal, triangular = torch.linalg.qr(weight)
        taken_down, taken_up = triangular[:rank], scale * orthogonal[:, :rank].T
    return torch.cat([down, taken_down]), torch.cat([up, -taken_up])


def _lower_embedding(source: Source, base: Base, program: Program, group: Group) -> None:
    """``E[id] + s (B A)[:, id]``; with DoRA all of it times ``m / norm`` per column, the norm over the vocabulary."""
    first, second = group["lora_embedding_A"], group["lora_embedding_B"]
    down, up = first.T, (second * scaling(source, group.site, first.shape[0])).T
    edit = program.embed(group.site)
    edit.down, edit.up = down, up
    magnitude = source.take(group.site, "lora_magnitude_vector", (group.spec.out_features,))
    if magnitude is not None:
        source.reserve(group.spec.in_features * group.spec.out_features)
        norm = torch.linalg.vector_norm(base.weight(group.site) + down @ up, dim=0)
        edit.out_scale = magnitude.to(base.compute) / norm


METHOD = Method(
    name="LORA",
    summary="low rank; DoRA adds an output scale; biases, token rows and replaced modules as themselves",
    fields={
        **WRAPPED_FIELDS,
        "r": integer(1, 4096),
        "lora_alpha": number(-1e6, 1e6),
        "use_rslora": boolean,
        # Checked where they are used, module by module.
        "rank_pattern": no_effect,
        "alpha_pattern": no_effect,
        "lora_bias": boolean,
        "use_dora": boolean,
        "init_lora_weights": _init,
        "trainable_token_indices": optional(_indices),
        "alora_invocation_tokens": optional(token_ids),
        "ensure_weight_tying": boolean,
        "use_bdlora": block_settings,
        "kasa_config": settings("beta", "gamma"),
        "velora_config": settings("num_groups", "scale", "init_type"),
        "monteclora_config": settings(
            "num_samples", "use_entropy", "dirichlet_prior", "sample_scaler", "kl_loss_weight", "buffer_size"
        ),
        # Training, initialisation and placement only.
        **dict.fromkeys(("lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config"), no_effect),
        **dict.fromkeys(("corda_config", "lora_ga_config", "runtime_config", "qalora_group_size"), no_effect),
        # These change the maths in ways that are not served.
        "use_qalora": only(False, None),
        "layer_replication": only(None),
        "target_parameters": only(None),
        "arrow_config": only(None),
    },
    lower=lower,
)
