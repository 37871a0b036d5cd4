"""Bottlenecks as AdapterHub stores them: Houlsby, Pfeiffer and parallel ones, AdapterPlus, Compacter, AdapterDrop.

One config class covers them all, by flags; their order is that of adapters 1.3's ``methods/modeling.py``. With s the sub-layer's output, r
the residual, LN the norm after their addition (post-norm bases only) and ``u = scaling * up(act(down([ln_before] x)))``:

parallel    ``x = r``; ``t = [ln_after](u) + s``
sequential  ``x = s``, or with ``original_ln_before`` ``LN(s + r)``, without LN ``s + r``. The bottleneck's own residual is s with
            ``residual_before_ln``, ``s + r`` with "post_add", else x; it is added before ``ln_after`` with ``adapter_residual_before_ln``.

With ``original_ln_after`` the layer goes on with ``LN(t + r)``, else with t itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from server.adapters.ir import BottleneckEdit, Placement, Program, Stream
from server.adapters.lower.adapterhub.options import ENVELOPE, Part, activation, activation_name, one_config
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, Rule, boolean, no_effect, only, optional
from server.adapters.lower.source import Source

_SHARED = ("shared_parameters.phm_rule", "shared_parameters.W_")
_INVERTIBLE = ("inv_adapter", "invertible_adapter")
_INTERFACE_FAMILIES = ("qwen2", "qwen3")


def _scaling(value: Any) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e6
    return None if number or value in ("learned", "channel") else "a number, learned or channel"


_FIELDS: dict[str, Rule] = {
    "architecture": only(None, "bottleneck"),
    "non_linearity": activation_name,
    "scaling": _scaling,
    **dict.fromkeys(("original_ln_before", "original_ln_after", "ln_before", "ln_after", "is_parallel"), boolean),
    "adapter_residual_before_ln": boolean,
    "residual_before_ln": only(True, False, "post_add"),
    "phm_layer": boolean,
    **dict.fromkeys(("shared_phm_rule", "factorized_phm_rule", "factorized_phm_W", "shared_W_phm"), optional(boolean)),
    # The gate averages over all tokens of the sequence, those to come included.
    "use_gating": only(False, None),
    **dict.fromkeys(_INVERTIBLE, no_effect),
    # Keys and shapes say where bottlenecks are, how wide, and whether there are biases.
    **dict.fromkeys(("mh_adapter", "output_adapter", "cross_adapter", "reduction_factor", "leave_out", "phm_bias"), no_effect),
    **dict.fromkeys(("phm_dim", "phm_rank", "inv_adapter_reduction_factor"), no_effect),
    # Initialisation and training only.
    **dict.fromkeys(("init_weights", "init_weights_seed", "dropout", "stochastic_depth", "learn_phm", "phm_c_init"), no_effect),
    **dict.fromkeys(("phm_init_range", "hypercomplex_nonlinearity"), no_effect),
}
_DEFAULTS: dict[str, Any] = {
    "original_ln_before": False,
    "original_ln_after": True,
    "is_parallel": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "scaling": 1.0,
    "phm_layer": False,
    "ln_before": False,
    "ln_after": False,
    "non_linearity": "relu",
}


def _lower(source: Source, base: Base, program: Program, given: Mapping[str, Any]) -> None:
    """The bottlenecks of one config: every site of a sub-layer that there are tensors for."""
    settings = {**_DEFAULTS, **given}
    if not base.spec.sublayers:
        message = f"on {base.spec.family} norms stand between a sub-layer and the addition; no bottleneck is served there"
        source.fault("unsupported_method", f"{source.file}: config", message)
    for field in _INVERTIBLE:
        # Task adapters of adapter-transformers may name a network that only language adapters have; the library drops it too.
        if settings.get(field) and source.config.get("type") != "text_task":
            message = "networks around the embeddings are not served"
            source.fault("unsupported_field", f"{source.file}: config.{field}", message, "null", repr(settings[field])[:80])
    source.stop_if_faulty()
    placement = _placement(source, base, settings)
    shared = {name: source.take_shared(name, (None, None, None)) for name in source.shared if name.startswith(_SHARED)}
    for sublayer in base.spec.sublayers:
        if source.has_any(sublayer.site, "bottleneck."):
            edit = _bottleneck(_Tensors(source, base, sublayer.site, shared), placement, settings)
            if edit is not None:
                program.add(sublayer.site, edit)


def _placement(source: Source, base: Base, settings: Mapping[str, Any]) -> Placement:
    post_norm = base.spec.sublayers[0].post_norm
    act = activation(source, settings["non_linearity"])
    replaces = not settings["original_ln_after"]
    if replaces and base.spec.family in _INTERFACE_FAMILIES:
        message = f"on {base.spec.family} the library itself always adds the residual; original_ln_after=false is not defined"
        source.fault("unsupported_field", f"{source.file}: config.original_ln_after", message, "true", "false")
    if settings["is_parallel"]:
        return Placement(act, source="residual", residual="sublayer", norm_first=True, replaces=replaces)
    x: Stream = "sublayer"
    if settings["original_ln_before"]:
        x = "normed" if post_norm else "sum"
    residual: Stream = x
    if settings["residual_before_ln"] == "post_add":
        residual = "sum"
        if x != "normed":
            message = "post_add needs original_ln_before, and a base with a norm after the addition"
            source.fault("unsupported_field", f"{source.file}: config.residual_before_ln", message, "true or false", "post_add")
    elif settings["residual_before_ln"]:
        residual = "sublayer"
    return Placement(act, x, residual, norm_first=not settings["adapter_residual_before_ln"], replaces=replaces)


@dataclass(frozen=True, slots=True)
class _Tensors:
    """One bottleneck's tensors in the accumulation dtype. Linear layers come as ``(in, out)`` and ``(out,)``; ``shared`` are those of
    the whole adapter. What is missing or does not fit is recorded and None."""

    source: Source
    base: Base
    site: str
    shared: Mapping[str, Tensor | None]

    def linear(self, module: str) -> tuple[Tensor | None, Tensor | None]:
        weight = self.need(f"{module}.weight", (None, None))
        bias = None if weight is None else self.need(f"{module}.bias", (weight.shape[0],))
        return None if weight is None else weight.T, bias

    def hypercomplex(self, module: str, side: str) -> tuple[Tensor | None, Tensor | None]:
        """A PHM layer (Mahabadi et al. 2021) spelt out: ``H = sum_i kron(rule_i, W_i)``, ``y = x H + b``."""
        rule = self._factored(f"{module}.phm_rule", "phm_rule")
        blocks = self._factored(f"{module}.W", f"W_{side}")
        bias = self.source.take(self.site, f"bottleneck.{module}.b", (None,))
        if rule is None or blocks is None or rule.shape[0] != blocks.shape[0]:
            message = "a PHM layer needs phm_rule and W, or their factors, of one dimension"
            self.source.fault("missing_tensor", f"{self.site}.{module}", message)
            return None, None
        size_in, size_out = rule.shape[1] * blocks.shape[1], rule.shape[2] * blocks.shape[2]
        if bias is not None and bias.shape[0] != size_out:
            self.source.fault("wrong_shape", f"{self.site}.{module}.b", "one number an output is needed", str(size_out))
            return None, None
        self.source.reserve(size_in * size_out)
        matrix = torch.einsum("nab,nio->aibo", rule, blocks).reshape(size_in, size_out)
        return matrix, None if bias is None else bias.to(self.base.compute)

    def norm(self, module: str) -> tuple[Tensor | None, Tensor | None]:
        width = (self.base.spec.hidden_size,)
        return self.need(f"{module}.weight", width), self.need(f"{module}.bias", width)

    def need(self, tail: str, shape: tuple[int | None, ...]) -> Tensor | None:
        if not self.source.has(self.site, f"bottleneck.{tail}"):
            message = "the checkpoint is incomplete, or its config says otherwise"
            self.source.fault("missing_tensor", f"{self.site}.{tail}", message)
        found = self.source.take(self.site, f"bottleneck.{tail}", shape)
        return None if found is None else found.to(self.base.compute)

    def _factored(self, name: str, shared: str) -> Tensor | None:
        """``(n, a, b)``: a tensor, or the product of its two factors; the layer's own, or one for all layers."""
        found: list[Tensor | None] = []
        for end in ("", "_left", "_right"):
            own = self.source.take(self.site, f"bottleneck.{name}{end}", (None, None, None))
            tensor = own if own is not None else self.shared.get(f"shared_parameters.{shared}{end}")
            found.append(None if tensor is None else tensor.to(self.base.compute))
        whole, left, right = found
        if whole is not None or left is None or right is None:
            return whole
        if left.shape[0] != right.shape[0] or left.shape[2] != right.shape[1]:
            return None
        self.source.reserve(left.shape[0] * left.shape[1] * right.shape[2])
        return torch.bmm(left, right)


def _bottleneck(tensors: _Tensors, placement: Placement, settings: Mapping[str, Any]) -> BottleneckEdit | None:
    hidden = tensors.base.spec.hidden_size
    before = tensors.norm("adapter_down.0") if settings["ln_before"] else (None, None)
    down_module = "adapter_down.1" if settings["ln_before"] else "adapter_down.0"
    if settings["phm_layer"]:
        (down, down_bias), (up, up_bias) = tensors.hypercomplex(down_module, "down"), tensors.hypercomplex("adapter_up", "up")
    else:
        (down, down_bias), (up, up_bias) = tensors.linear(down_module), tensors.linear("adapter_up")
    after = tensors.norm("adapter_norm_after") if settings["ln_after"] else (None, None)
    scaling = _scaling_of(tensors, settings["scaling"])
    if down is None or up is None or scaling is None:
        return None
    rank = down.shape[1]
    if rank < 1 or tuple(down.shape) != (hidden, rank) or tuple(up.shape) != (rank, hidden):
        found = f"{tuple(down.shape)}, {tuple(up.shape)}"
        message = "the two matrices do not make a bottleneck"
        tensors.source.fault("wrong_shape", tensors.site, message, f"({hidden}, r), (r, {hidden})", found)
        return None
    up_bias = None if up_bias is None else up_bias * scaling
    return BottleneckEdit(placement, down.T, up * scaling, down_bias, up_bias, *before, *after)


def _scaling_of(tensors: _Tensors, scaling: Any) -> Tensor | None:
    if not isinstance(scaling, str):
        return torch.tensor(float(scaling), dtype=tensors.base.compute)
    return tensors.need("scaling", (1,) if scaling == "learned" else (tensors.base.spec.hidden_size,))


BOTTLENECKS = Part(_FIELDS, _lower)
METHOD = Method(
    name="bottleneck",
    summary="bottlenecks at sub-layers' outputs, with their placement; Compacter's are spelt out",
    fields=ENVELOPE,
    lower=one_config(BOTTLENECKS),
)
