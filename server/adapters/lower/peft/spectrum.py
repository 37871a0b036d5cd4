"""Spectra: values at places of a matrix that a seed decides, as FourierFT and WaveFT store them. Knows no transform."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.delta import add_dense, linears_with
from server.adapters.lower.source import Source

DEFAULT_SEED = 777


def lower_spectra(
    source: Source, base: Base, tail: str, frequencies: int | None, transform: Callable[[Tensor], Tensor]
) -> Program:
    """``W += transform(S)`` for every module; ``S (out, in)`` is zero but for the stored values.

    Their places are the first ``n`` of a seeded permutation of all places, row by row. ``frequencies`` is what n must be where
    ``n_frequency_pattern`` says nothing else, None where the config does not fix it.
    """
    program = Program()
    seed = source.config.get("random_loc_seed", DEFAULT_SEED)
    places: dict[tuple[int, int], Tensor] = {}
    for spec in linears_with(source, base, tail):
        values = source.take(spec.name, tail, (None,))
        if values is None:
            continue
        count, size = values.shape[0], spec.out_features * spec.in_features
        stated = count if frequencies is None else source.pattern("n_frequency_pattern", spec.name, frequencies)
        if count != stated or not 0 < count <= size:
            source.fault(
                "wrong_rank",
                f"{spec.name}.{tail}",
                "the tensor and the config (n_frequency, n_frequency_pattern) disagree on the number of values, or it does not fit",
                str(stated)[:40],
                str(count),
            )
            continue
        if (size, count) not in places:
            permutation = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
            places[size, count] = permutation[:count].clone()
        spectrum = torch.zeros(size, dtype=base.compute)
        spectrum[places[size, count]] = values.to(base.compute)
        add_dense(program.linear(spec.name), transform(spectrum.view(spec.out_features, spec.in_features)))
    return program
