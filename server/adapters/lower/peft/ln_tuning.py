"""LN tuning (Zhao et al. 2024) as PEFT stores it: trained copies of norms."""

from __future__ import annotations

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import NormEdit, Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method
from server.adapters.lower.peft.wrapped import WRAPPED_FIELDS, Shapes, tensor_groups, with_saved_modules
from server.adapters.lower.source import Source

_WEIGHT, _BIAS = "ln_tuning_layers.weight", "ln_tuning_layers.bias"


def lower(source: Source, base: Base) -> Program:
    """Replaced weights, and biases where the norm has them."""

    def shapes(spec: SiteSpec) -> Shapes:
        return {_WEIGHT: ("out",), _BIAS: ("out",)} if spec.has_bias else {_WEIGHT: ("out",)}

    program = Program()
    for group in tensor_groups(source, base, "ln_tuning_layers.", shapes, kinds=("norm",)):
        program.add(group.site, NormEdit(group[_WEIGHT], group.tensors.get(_BIAS)))
    return with_saved_modules(source, base, program)


METHOD = Method(name="LN_TUNING", summary="replaced norms", fields=WRAPPED_FIELDS, lower=lower)
