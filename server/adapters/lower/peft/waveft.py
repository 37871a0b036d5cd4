"""WaveFT (Bilican et al. 2025) as PEFT stores it: the change is one inverse wavelet step of a sparse spectrum; the Haar wavelet only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, boolean
from server.adapters.lower.peft.spectrum import SPECTRUM_FIELDS, lower_spectra
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """``W += idwt(S) * scaling``, or ``S * scaling`` without ``use_idwt``."""
    scaling, use_idwt = source.config.get("scaling", 25.0), source.config.get("use_idwt", True)
    # With proportional_parameters the number of values follows from all targeted modules; the tensors say it.
    frequencies = None if source.config.get("proportional_parameters") else source.config.get("n_frequency", 2592)

    def transform(spectrum: Tensor) -> Tensor:
        change: Tensor = (inverse_haar(spectrum) if use_idwt else spectrum) * scaling
        return change

    return lower_spectra(source, base, "waveft_spectrum", frequencies, transform)


def inverse_haar(spectrum: Tensor) -> Tensor:
    """One step of the two-dimensional inverse transform: the quadrants of ``spectrum (rows, columns)`` are average, horizontal (right),
    vertical (below) and diagonal details. Odd sizes are padded by one and cut again."""
    rows, columns = spectrum.shape
    padded = F.pad(spectrum, (0, columns % 2, 0, rows % 2))
    top, bottom = padded.chunk(2, dim=0)
    (average, horizontal), (vertical, diagonal) = top.chunk(2, dim=1), bottom.chunk(2, dim=1)
    result = torch.empty_like(padded)
    result[0::2, 0::2] = average + horizontal + vertical + diagonal
    result[0::2, 1::2] = average + horizontal - vertical - diagonal
    result[1::2, 0::2] = average - horizontal + vertical - diagonal
    result[1::2, 1::2] = average - horizontal - vertical + diagonal
    return result[:rows, :columns] / 2


def _wavelet(value: Any) -> str | None:
    return None if value == "db1" else "'db1' (the Haar wavelet); the filters of other families are not carried here"


METHOD = Method(
    name="WAVEFT",
    summary="a dense change: the inverse Haar transform of stored values at seeded places (`wavelet_family: db1` only)",
    fields={**SPECTRUM_FIELDS, "proportional_parameters": boolean, "wavelet_family": _wavelet, "use_idwt": boolean},
    lower=lower,
)
