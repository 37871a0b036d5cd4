"""Variants of LoRA that one field of PEFT's config switches on: block-diagonal matrices, KaSA, VeLoRA, MonteCLoRA.

Knows what they store beside, or instead of, plain A and B; scales and everything else are ``lora``'s.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from server.adapters.lower.base import Base
from server.adapters.lower.method import Rule, integer
from server.adapters.lower.peft.wrapped import Group
from server.adapters.lower.source import Source

_EXCLUSIVE = ("use_dora", "alora_invocation_tokens", "use_bdlora", "kasa_config", "velora_config", "monteclora_config")
_TRAINING_ONLY = {"velora_config": "lora_velora_", "monteclora_config": "lora_monteclora_sampler."}
_MAX_BLOCKS = 4096


def settings(*names: str) -> Rule:
    """Null, or an object of these fields at most."""

    def rule(value: Any) -> str | None:
        fits = value is None or value is False or (isinstance(value, dict) and set(value) <= set(names))
        return None if fits else f"null, or an object of {', '.join(names)}"

    return rule


def block_settings(value: Any) -> str | None:
    """``use_bdlora``, of which only the number of blocks matters: the shapes say which matrix is in blocks."""
    unfit = settings("target_modules_bd_a", "target_modules_bd_b", "nblocks", "match_strict")(value)
    if unfit is None and value:
        unfit = integer(1, _MAX_BLOCKS)(value.get("nblocks", 1))
    return unfit


def check_combination(source: Source, changes_base: bool) -> None:
    """PEFT has no two of these at once; and only DoRA is defined on a base that the initialisation changed. Raises LoweringError otherwise."""
    chosen = [field for field in _EXCLUSIVE if source.config.get(field)]
    for field in chosen[1:]:
        source.field_fault(field, f"this cannot be combined with {chosen[0]}")
    if changes_base and chosen and chosen != ["use_dora"]:
        source.field_fault("init_lora_weights", f"this initialisation cannot be combined with {chosen[0]}")
    source.stop_if_faulty()


def spread_blocks(source: Source, group: Group) -> tuple[Tensor, Tensor] | None:
    """A and B of which one may hold the blocks of a block-diagonal matrix below each other: ``(r, in / n)`` or ``(out, r / n)``."""
    first, second, spec = group["lora_A.weight"], group["lora_B.weight"], group.spec
    blocks = source.config["use_bdlora"].get("nblocks", 1)
    down = _spread(source, first, spec.in_features, blocks)
    up = None if down is None else _spread(source, second, down.shape[0], blocks)
    if down is None or up is None:
        source.fault(
            "wrong_shape",
            spec.name,
            f"lora_A and lora_B do not fit the module, neither whole nor as {blocks} blocks",
            f"(r, {spec.in_features}) and ({spec.out_features}, r)",
            f"{tuple(first.shape)} and {tuple(second.shape)}",
        )
        return None
    return down, up


def truncate_base(source: Source, base: Base, group: Group, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """KaSA: ``s B diag(d) A``, on a base without its ``r`` smallest singular components, which are ``r`` more ranks here."""
    rank, limit = down.shape[0], min(group.spec.in_features, group.spec.out_features)
    if rank >= limit:
        source.fault(
            "wrong_rank", group.site, "KaSA takes as many singular components out of the base", f"below {limit}", str(rank)
        )
        return down, up
    left, values, right = torch.linalg.svd(base.weight(group.site), full_matrices=False)
    kept = limit - rank
    taken = (left[:, kept:] * values[kept:]).T
    return torch.cat([down, right[kept:]]), torch.cat([up * group["lora_diag"][:, None], -taken])


def drop_training_state(source: Source, site: str) -> None:
    """Take what VeLoRA and MonteCLoRA use in training only; at inference both are plain LoRA."""
    for field, prefix in _TRAINING_ONLY.items():
        if source.config.get(field):
            for tail in source.tails(site):
                if tail.startswith(prefix):
                    source.take(site, tail)


def _spread(source: Source, matrix: Tensor, columns: int, blocks: int) -> Tensor | None:
    """``(rows, columns)``: as it is, or its blocks set on the diagonal; None when it is neither."""
    rows, width = matrix.shape
    if width == columns:
        return matrix
    if width * blocks != columns or rows % blocks:
        return None
    source.reserve(rows * columns)
    spread: Tensor = torch.block_diag(*matrix.chunk(blocks, dim=0))  # type: ignore[no-untyped-call]
    return spread
