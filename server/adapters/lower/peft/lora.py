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
from server.adapters.lower.method import (
    COMMON_FIELDS,
    Method,
    boolean,
    integer,
    no_effect,
    number,
    only,
    optional,
    token_ids,
)
from server.adapters.lower.peft.lora_variants import (
    block_settings,
    check_combination,
    drop_training_state,
    settings,
    take_blocks,
    truncate_base,
)
from server.adapters.lower.peft.replaced import lower_biases, lower_replaced_modules, lower_token_rows
from server.adapters.lower.source import Source

PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
REINITS = ("pissa", "olora")


def _init(value: Any) -> str | None:
    """Initialisations that leave the base alone are history; PiSSA and OLoRA took a part out of it, which is put back as rank."""
    fits = any(type(value) is type(item) and value == item for item in (*PLAIN_INITS, *REINITS))
    return (
        None
        if fits
        else "true, false, gaussian, eva, orthogonal, mica, lora_ga, pissa or olora (others changed the base irreproducibly)"
    )


def _indices(value: Any) -> str | None:
    lists = value.values() if isinstance(value, dict) else [value]
    return None if all(token_ids(item) is None for item in lists) else "a list of token ids, or an object of them"


def lower(source: Source, base: Base) -> Program:
    """Everything a PEFT LoRA checkpoint may hold, site by site."""
    program = Program(invocation_tokens=tuple(source.config.get("alora_invocation_tokens") or ()))
    check_combination(source, changes_base=source.config.get("init_lora_weights") in REINITS)
    lower_token_rows(source, base, program, source.config.get("trainable_token_indices"))
    for site in source.sites:
        spec = base.spec.site(site)
        if spec is None:
            continue
        if source.has(site, "lora_embedding_A") or source.has(site, "lora_embedding_B"):
            _lower_embedding(source, base, program, spec)
        if source.has(site, "lora_A.weight") or source.has(site, "lora_B.weight"):
            _lower_linear(source, base, program, spec)
    lower_biases(source, base, program)
    lower_replaced_modules(source, base, program)
    return program


def scaling(source: Source, site: str, rank: int) -> float:
    """``s`` of one module. The stored rank must be the one that the config gives, or the scale would be a guess."""
    stated = source.pattern("rank_pattern", site, source.config.get("r", 8))
    alpha = source.pattern("alpha_pattern", site, source.config.get("lora_alpha", 8))
    if stated != rank:
        source.fault(
            "wrong_rank", site, "the tensors and the config (r, rank_pattern) disagree on the rank", str(stated)[:40], str(rank)
        )
        return 0.0
    if number(-1e6, 1e6)(alpha) is not None:
        source.fault(
            "unsupported_field", "adapter_config.json: alpha_pattern", "alpha must be a finite number", found=repr(alpha)[:40]
        )
        return 0.0
    return float(alpha) / (math.sqrt(rank) if source.config.get("use_rslora") else rank)


def _lower_linear(source: Source, base: Base, program: Program, spec: SiteSpec) -> None:
    site = spec.name
    if spec.kind not in ("linear", "head"):
        source.fault("wrong_module", site, f"LoRA matrices on a {spec.kind} are not defined")
        return
    if source.config.get("use_bdlora"):
        pair = take_blocks(source, spec)
    else:
        pair = _pair(source, site, ("lora_A.weight", (None, spec.in_features)), ("lora_B.weight", (spec.out_features, None)))
    if pair is None:
        return
    drop_training_state(source, site)
    down, up = (tensor.to(base.compute) for tensor in pair)
    scale = scaling(source, site, down.shape[0])
    up = (up * scale).T
    edit = program.linear(site)
    bias = source.take(site, "lora_B.bias", (spec.out_features,))
    if bias is not None:
        edit.shift = bias.to(base.compute) * scale
    if source.config.get("kasa_config"):
        down, up = truncate_base(source, base, spec, down, up)
    elif source.config.get("init_lora_weights") in REINITS:
        down, up = _restore_base(source, base, spec, down, up, scale)
    if source.has(site, "lora_magnitude_vector"):
        down, up = _decompose(source, base, program, spec, down, up)
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


def _lower_embedding(source: Source, base: Base, program: Program, spec: SiteSpec) -> None:
    """``E[id] + s (B A)[:, id]``; with DoRA all of it times ``m / norm`` per column, the norm over the vocabulary."""
    site = spec.name
    if spec.kind != "embedding":
        source.fault("wrong_module", site, f"embedding matrices on a {spec.kind} are not defined")
        return
    vocab, width = spec.in_features, spec.out_features
    pair = _pair(source, site, ("lora_embedding_A", (None, vocab)), ("lora_embedding_B", (width, None)))
    if pair is None:
        return
    scale = scaling(source, site, pair[0].shape[0])
    down, up = pair[0].to(base.compute).T, (pair[1].to(base.compute) * scale).T
    edit = program.embed(site)
    edit.down, edit.up = down, up
    magnitude = source.take(site, "lora_magnitude_vector", (width,))
    if magnitude is not None:
        norm = torch.linalg.vector_norm(base.weight(site) + down @ up, dim=0)
        edit.out_scale = magnitude.to(base.compute) / norm


def _pair(
    source: Source, site: str, first: tuple[str, tuple[int | None, ...]], second: tuple[str, tuple[int | None, ...]]
) -> tuple[Tensor, Tensor] | None:
    """A and B, whose ranks must agree. PEFT only warns of a missing half; here it is a fault."""
    for tail, _ in (first, second):
        if not source.has(site, tail):
            source.fault("missing_tensor", f"{site}.{tail}", "one half of the pair is missing; the checkpoint is incomplete")
    left, right = source.take(site, *first), source.take(site, *second)
    if left is None or right is None:
        return None
    if left.shape[0] != right.shape[1] or not left.shape[0]:
        source.fault("wrong_rank", site, "the two matrices have different ranks", str(left.shape[0]), str(right.shape[1]))
        return None
    return left, right


METHOD = Method(
    name="LORA",
    summary="low rank; DoRA adds an output scale; biases, token rows and replaced modules as themselves",
    fields={
        **COMMON_FIELDS,
        "r": integer(1, 4096),
        "lora_alpha": number(-1e6, 1e6),
        "use_rslora": boolean,
        "rank_pattern": no_effect,
        "alpha_pattern": no_effect,
        "bias": only("none", "all", "lora_only"),
        "lora_bias": boolean,
        "use_dora": boolean,
        "init_lora_weights": _init,
        "trainable_token_indices": optional(_indices),
        "alora_invocation_tokens": optional(token_ids),
        "modules_to_save": no_effect,
        "ensure_weight_tying": boolean,
        "use_bdlora": block_settings,
        "kasa_config": settings("beta", "gamma"),
        "velora_config": settings("num_groups", "scale", "init_type"),
        "monteclora_config": settings(
            "num_samples", "use_entropy", "dirichlet_prior", "sample_scaler", "kl_loss_weight", "buffer_size"
        ),
        # The tensors' own keys say where they belong.
        "target_modules": no_effect,
        "exclude_modules": no_effect,
        "layers_to_transform": no_effect,
        "layers_pattern": no_effect,
        "fan_in_fan_out": no_effect,
        # Training, initialisation and placement only.
        "lora_dropout": no_effect,
        "megatron_config": no_effect,
        "megatron_core": no_effect,
        "loftq_config": no_effect,
        "eva_config": no_effect,
        "corda_config": no_effect,
        "lora_ga_config": no_effect,
        "runtime_config": no_effect,
        "qalora_group_size": no_effect,
        # These change the maths in ways that are not served.
        "use_qalora": only(False, None),
        "layer_replication": only(None),
        "target_parameters": only(None),
        "arrow_config": only(None),
    },
    lower=lower,
)
