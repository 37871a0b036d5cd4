"""LoReFT and NoReFT (Wu et al. 2024) as AdapterHub stores them: ``h + (act(W h + b) - R h) R`` at layers' outputs, for the first tokens.

A projection that is kept orthogonal is stored as PyTorch's Householder parametrisation, and multiplied out here. DiReFT, which does not
subtract, saves the same config as NoReFT; the library reads both as NoReFT.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.ir import InterventionEdit, Program
from server.adapters.lower.adapterhub.options import ENVELOPE, Part, activation, activation_name, one_config
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, Rule, integer, no_effect, only, optional
from server.adapters.lower.source import Source

_FIELDS: dict[str, Rule] = {
    "architecture": only("reft"),
    "prefix_positions": integer(1, 1 << 16),
    # The last tokens are others with every token that is generated.
    "suffix_positions": only(0),
    "r": integer(1, 4096),
    "non_linearity": optional(activation_name),
    # Keys and tensors say where units are and how their projections are stored.
    **dict.fromkeys(("layers", "orthogonality", "tied_weights", "output_reft"), no_effect),
    **dict.fromkeys(("dropout", "dtype", "init_weights_seed"), no_effect),
}


def _lower(source: Source, base: Base, program: Program, given: Mapping[str, Any]) -> None:
    """The unit of the first tokens, layer by layer."""
    act = given.get("non_linearity")
    name = activation(source, act) if act else "linear"
    for spec in source.sites("refts.", ("layer",)):
        site = spec.name
        edits = [_unit(source, base, site, unit, name, given.get("prefix_positions", 3)) for unit in (0, 1)]
        # Unit 1 is that of the last tokens, of which there are none.
        if edits[0] is None:
            source.fault("missing_tensor", site, "the unit of the first tokens needs learned_source and projection")
        else:
            program.add(site, edits[0])


def _unit(source: Source, base: Base, site: str, unit: int, act: str, positions: int) -> InterventionEdit | None:
    prefix, hidden = f"refts.units.{unit}.", base.spec.hidden_size
    weight = source.take(site, f"{prefix}learned_source.weight", (None, hidden))
    rank = None if weight is None else weight.shape[0]
    bias = source.take(site, f"{prefix}learned_source.bias", (rank,))
    project = source.take(site, f"{prefix}projection.weight", (rank, hidden))
    if project is None:
        project = _orthogonal(source, base, site, f"{prefix}projection.parametrizations.weight.", rank)
    if weight is None or bias is None or project is None:
        return None
    return InterventionEdit(
        source=weight.to(base.compute),
        source_bias=bias.to(base.compute),
        project=project.to(base.compute),
        activation=act,
        positions=positions,
    )


def _orthogonal(source: Source, base: Base, site: str, prefix: str, rank: int | None) -> Tensor | None:
    """``torch.nn.utils.parametrizations.orthogonal`` of a wide matrix: a product of Householder reflections, moved by ``base``."""
    hidden = base.spec.hidden_size
    original = source.take(site, f"{prefix}original", (rank, hidden))
    moved = source.take(site, f"{prefix}0.base", (hidden, hidden))
    if original is None or moved is None or not 0 < original.shape[0] < hidden:
        return None
    tall = original.to(base.compute).T
    below = tall.tril(diagonal=-1)
    tau = 2.0 / (1.0 + (below * below).sum(dim=-2))
    product: Tensor = torch.linalg.householder_product(below, tau) * tall.diagonal().int()
    return (moved.to(base.compute) @ product).T


METHOD = Method(
    name="reft",
    summary="interventions on layers' outputs at the first tokens",
    fields=ENVELOPE,
    lower=one_config(Part(_FIELDS, _lower)),
)
