"""FourierFT (Gao et al. 2024) as PEFT stores it: the change is the inverse Fourier transform of a sparse spectrum."""

from __future__ import annotations

import torch

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import COMMON_FIELDS, Method, integer, no_effect, number, only
from server.adapters.lower.peft.replaced import lower_biases, lower_replaced_modules
from server.adapters.lower.peft.spectrum import lower_spectra
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """``W += Re(ifft2(S)) * scaling``."""
    scaling = source.config.get("scaling", 150.0)
    program = lower_spectra(
        source,
        base,
        "fourierft_spectrum",
        source.config.get("n_frequency", 1000),
        lambda spectrum: torch.fft.ifft2(spectrum).real * scaling,
    )
    lower_biases(source, base, program)
    lower_replaced_modules(source, base, program)
    return program


METHOD = Method(
    name="FOURIERFT",
    summary="a dense change: the inverse Fourier transform of stored values at seeded places",
    fields={
        **COMMON_FIELDS,
        "n_frequency": integer(1, 2**40),
        "n_frequency_pattern": no_effect,
        "scaling": number(-1e6, 1e6),
        "random_loc_seed": integer(0, 2**63 - 1),
        "bias": only("none", "all", "fourier_only", "fourierft_only"),
        "modules_to_save": no_effect,
        **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), no_effect),
        **dict.fromkeys(("fan_in_fan_out", "init_weights"), no_effect),
    },
    lower=lower,
)
