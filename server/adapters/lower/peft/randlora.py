"""RandLoRA (Albert et al. 2025) as PEFT stores it: shared random bases, each module scaling them; the change is of full rank.

With ``mn, mx = min, max(out, in)`` and ``n = ceil(mn / r)`` bases: ``M = B.flatten(1) @ (lambda[:, :, None] * A * gamma).flatten(0, 1) *
alpha / r`` of shape ``(mx, mn)``; the change is M, or its transpose where ``in`` is the larger side. The two flattenings do not order
(rank, basis) alike; that is what PEFT computes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, boolean, integer, no_effect, number
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS, shared_tensor, tensor_groups, with_saved_modules
from server.adapters.lower.source import Source

_FIRST, _SECOND = "randlora_A", "randlora_B"
_SCALES, _GAINS = "randlora_lambda", "randlora_gamma"


def lower(source: Source, base: Base) -> Program:
    """One dense change a module. The bases are in the checkpoint, or drawn again from their seed."""
    program = Program()
    rank, alpha = source.config.get("r", 32), source.config.get("randlora_alpha", 640)
    groups = list(tensor_groups(source, base, "randlora_", {_SCALES: ("r", "n"), _GAINS: ("n", "small")}))
    bases = _bases(source, [group.spec for group in groups], rank)
    if bases is None:
        return program
    for group in groups:
        spec = group.spec
        _check_copies(source, spec.name, bases)
        small, large = sorted((spec.in_features, spec.out_features))
        count = math.ceil(small / rank)
        scales, gains = group[_SCALES], group[_GAINS]
        if tuple(scales.shape) != (rank, count) or gains.shape[1] != small:
            message = "the module's scales do not fit it, or the rank r of the config"
            found = f"{tuple(scales.shape)}, {tuple(gains.shape)}"
            source.fault("wrong_shape", spec.name, message, f"{(rank, count)}, {(count, small)}", found)
            continue
        first, second = (tensor.to(base.compute) for tensor in bases)
        if first.shape[2] < small or second.shape[0] < large or second.shape[1] < count:
            source.fault(
                "wrong_shape",
                spec.name,
                "the shared bases are smaller than this module; was the adapter trained on another base model?",
            )
            continue
        source.reserve(small * large)
        right = (scales[:, :, None] * first[:, :, :small] * gains).flatten(end_dim=1)
        product = second[:large, :count].flatten(start_dim=1) @ right * (alpha / rank)
        program.linear(spec.name).dense = product if small == spec.in_features else product.T
    return with_saved_modules(source, base, program)


def _bases(source: Source, specs: list[SiteSpec], rank: int) -> tuple[Tensor, Tensor] | None:
    """``A (r, 1, mn)`` and ``B (mx, n, r)``."""
    if source.config.get("save_projection", True):
        first = shared_tensor(source, _FIRST, (rank, 1, None))
        second = shared_tensor(source, _SECOND, (None, None, rank))
        return None if first is None or second is None else (first, second)
    if not specs:
        return None
    sizes = (max(spec.in_features for spec in specs), max(spec.out_features for spec in specs))
    # A rank above every width would make the bases larger than any module.
    if rank > max(sizes):
        source.field_fault("r", "the rank is larger than every module", f"at most {max(sizes)}")
        return None
    return _draw(source, min(sizes), max(sizes), rank)


def _draw(source: Source, small: int, large: int, rank: int) -> tuple[Tensor, Tensor]:
    """As PEFT draws them: on the CPU, from one seed, the dense ones in bfloat16."""
    generator = torch.Generator().manual_seed(source.config.get("projection_prng_key", 0))
    count = math.ceil(small / rank)
    source.reserve(rank * (small + large * count))
    if source.config.get("very_sparse") or source.config.get("sparse"):
        sparsity = math.sqrt(small) if source.config.get("very_sparse") else 3.0
        return _sparse((rank, 1, small), sparsity, generator), _sparse((large, count, rank), sparsity, generator)
    first = _kaiming((rank, 1, small), generator)
    second = torch.cat([_kaiming((large, 1, rank), generator) for _ in range(count)], dim=1)
    return first / first.std(), second / second.std()


def _kaiming(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=torch.bfloat16), a=math.sqrt(5), generator=generator)


def _sparse(shape: tuple[int, ...], sparsity: float, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(shape, generator=generator)
    edge = 1 / (2 * sparsity)
    signs = (drawn > 1 - edge).float() - (drawn < edge).float()
    return signs / signs.std()


def _check_copies(source: Source, site: str, bases: tuple[Tensor, Tensor]) -> None:
    """PEFT 0.21 also writes the shared bases beside every module; they must be the same."""
    for name, shared in zip((_FIRST, _SECOND), bases, strict=True):
        copy = source.take(site, name)
        if copy is not None and not torch.equal(copy, shared):
            source.fault(
                "duplicate_tensor", f"{site}.{name}", "a module's copy of the shared basis differs from it; remove the copies"
            )


METHOD = Method(
    name="RANDLORA",
    summary="a dense change, made of shared random bases that are stored or drawn again",
    fields={
        **WRAPPED_FIELDS,
        "r": integer(1, 4096),
        "randlora_alpha": number(-1e6, 1e6),
        "projection_prng_key": integer(0, 2**63 - 1),
        "save_projection": boolean,
        "sparse": boolean,
        "very_sparse": boolean,
        "randlora_dropout": no_effect,
    },
    lower=lower,
)
