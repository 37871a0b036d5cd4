"""FourierFT (Gao et al. 2024) as PEFT stores it: the change is the inverse Fourier transform of a sparse spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method
from server.adapters.lower.peft.spectrum import SPECTRUM_FIELDS, lower_spectra
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """``W += Re(ifft2(S)) * scaling``."""
    scaling = source.config.get("scaling", 150.0)

    def transform(spectrum: Tensor) -> Tensor:
        change: Tensor = torch.fft.ifft2(spectrum).real * scaling
        return change

    return lower_spectra(source, base, "fourierft_spectrum", source.config.get("n_frequency", 1000), transform)


METHOD = Method(
    name="FOURIERFT",
    summary="a dense change: the inverse Fourier transform of stored values at seeded places",
    fields=SPECTRUM_FIELDS,
    lower=lower,
)
