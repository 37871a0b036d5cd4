"""BitFit (Ben Zaken et al. 2022): trained biases, in Medley's own format (docs/FORMATS.md); no library has one."""

from __future__ import annotations

from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import NormEdit, Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, no_effect, only
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """Tensors named like the base's biases: what is added to them (``values: delta``), or what they become (``replaced``)."""
    program = Program()
    for spec in source.sites("bias"):
        if spec.kind not in ("linear", "head", "norm"):
            continue
        bias = source.take(spec.name, "bias", (spec.out_features,))
        if bias is not None:
            _lower_bias(source, base, program, spec, bias.to(base.compute))
    return program


def _lower_bias(source: Source, base: Base, program: Program, spec: SiteSpec, bias: Tensor) -> None:
    is_delta = source.config.get("values", "delta") == "delta"
    if not spec.has_bias and (spec.kind == "norm" or not is_delta):
        # A linear without a bias can take a delta all the same: zero plus the delta.
        source.fault("unmatched_tensor", f"{spec.name}.bias", "the base model has no bias here; leave the tensor out")
    elif spec.kind == "norm":
        program.add(spec.name, NormEdit(bias=base.bias(spec.name) + bias if is_delta else bias))
    else:
        program.linear(spec.name).shift = bias if is_delta else bias - base.bias(spec.name)


METHOD = Method(
    name="BITFIT",
    summary="biases: a shift on linears, a replaced bias on norms",
    fields={
        "medley_type": no_effect,
        "base_model_name_or_path": no_effect,
        "values": only("delta", "replaced"),
    },
    lower=lower,
)
