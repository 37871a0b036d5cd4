"""Spectra: values at places of a matrix that a seed decides, as FourierFT and WaveFT store them. Knows no transform."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Rule, integer, no_effect, number
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS, Group, lower_groups
from server.adapters.lower.source import Source

DEFAULT_SEED = 777
SPECTRUM_FIELDS: dict[str, Rule] = {
    **WRAPPED_FIELDS,
    "n_frequency": integer(1, 2**40),
    # Checked where it is used.
    "n_frequency_pattern": no_effect,
    "scaling": number(-1e6, 1e6),
    "random_loc_seed": integer(0, 2**63 - 1),
}


def lower_spectra(
    source: Source, base: Base, tail: str, frequencies: int | None, transform: Callable[[Tensor], Tensor]
) -> Program:
    """``W += transform(S)`` for every module; ``S (out, in)`` is zero but for the stored values.

    Their places are the first ``n`` of a seeded permutation of all places, row by row. ``frequencies`` is what n must be where
    ``n_frequency_pattern`` says nothing else, None where the config does not fix it.
    """
    seed = source.config.get("random_loc_seed", DEFAULT_SEED)
    places: dict[tuple[int, int], Tensor] = {}

    def lower_site(program: Program, group: Group) -> None:
        spec, count = group.spec, group.sizes["n"]
        size = spec.out_features * spec.in_features
        stated = count if frequencies is None else source.pattern("n_frequency_pattern", spec.name, frequencies)
        if count != stated or count > size:
            message = "the tensor and the config (n_frequency, n_frequency_pattern) disagree on the number of values, or it does not fit"
            source.fault("wrong_rank", f"{spec.name}.{tail}", message, f"{str(stated)[:40]}, at most {size}", str(count))
            return
        source.reserve(size)
        if (size, count) not in places:
            permutation = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
            places[size, count] = permutation[:count].clone()
        spectrum = torch.zeros(size, dtype=base.compute)
        spectrum[places[size, count]] = group[tail]
        program.linear(spec.name).dense = transform(spectrum.view(spec.out_features, spec.in_features))

    return lower_groups(source, base, tail, {tail: ("n",)}, lower_site)
