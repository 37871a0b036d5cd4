"""AdapterFusion (Pfeiffer et al. 2021) as AdapterHub stores it: attention over the bottlenecks of other adapters, its children.

``t = sum_i softmax_i(query(x) . key(u_i)) value(u_i) + residual`` in place of one bottleneck's. All children read the x of the last one, whose
flags also say what the residual is and how the layer goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from server.adapters.ir import BottleneckEdit, FusionEdit, Placement, Program
from server.adapters.lower.adapterhub.bottleneck import BOTTLENECKS
from server.adapters.lower.adapterhub.options import ENVELOPE, one_config, options
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, Rule, boolean, no_effect, only
from server.adapters.lower.source import Source

_FIELDS: dict[str, Rule] = {
    **dict.fromkeys(("key", "query", "value", "query_before_ln"), boolean),
    # The library adds the residual to the keys too, by an update in place.
    "residual_before": only(False, None),
    # The temperature falls with every forward pass that the process has made.
    "temperature": only(False, None),
    # The value has no bias: before or after the weighted sum is the same.
    "value_before_softmax": no_effect,
    **dict.fromkeys(("regularization", "value_initialized", "dropout_prob"), no_effect),
}


def lower(source: Source, base: Base) -> Program:
    """The children's bottlenecks and the attention over them, site by site."""
    given = options(source, source.config.get("config"), _FIELDS)
    names = _names(source)
    children = {name: _child(source, base, name) for name in names}
    source.stop_if_faulty()
    program = Program()
    for sublayer in base.spec.sublayers:
        here = {name: edit for name, child in children.items() if (edit := _bottleneck(child, sublayer.site)) is not None}
        has_fusion = source.has_any(sublayer.site, "fusion.")
        if not here or not has_fusion:
            if here:
                message = f"{', '.join(here)} have bottlenecks here, but the fusion does not"
                source.fault("missing_tensor", f"{sublayer.site}.fusion", message)
            continue
        last = here.get(names[-1])
        if last is None:
            message = f"{names[-1]}, whose flags the fusion follows, has no bottleneck here"
            source.fault("missing_tensor", sublayer.site, message)
            continue
        for edit in here.values():
            program.add(sublayer.site, replace(edit, placement=replace(edit.placement, source=last.placement.source)))
        program.add(sublayer.site, _fusion(source, base, sublayer.site, last.placement, given))
    return program


def _names(source: Source) -> list[str]:
    """The children's names, in the order of the fusion."""
    names = str(source.config.get("name", "")).split(",")
    missing = [name for name in names if name not in source.checkpoint.children]
    if missing or len(set(names)) != len(names):
        message = f"the fusion needs the adapters that it was trained over: {', '.join(missing or names)[:200]}"
        source.fault("missing_child", f"{source.file}: name", message)
        source.stop_if_faulty()
    return names


def _child(source: Source, base: Base, name: str) -> Program:
    child = source.part(source.checkpoint.children[name], f"{name}: adapter_config.json")
    child.check_fields(ENVELOPE)
    program = one_config(BOTTLENECKS)(child, base)
    child.check_all_used()
    return program


def _bottleneck(child: Program, site: str) -> BottleneckEdit | None:
    return next((edit for edit in child.edits.get(site, ()) if isinstance(edit, BottleneckEdit)), None)


def _fusion(source: Source, base: Base, site: str, last: Placement, given: Mapping[str, Any]) -> FusionEdit:
    hidden = base.spec.hidden_size

    def take(name: str, *shape: int) -> Tensor | None:
        if not given.get(name.partition(".")[0], True):
            return None
        if not source.has(site, f"fusion.{name}"):
            source.fault("missing_tensor", f"{site}.fusion.{name}", "the checkpoint is incomplete, or its config says otherwise")
        found = source.take(site, f"fusion.{name}", shape)
        return None if found is None else found.to(base.compute)

    is_parallel = last.source == "residual"
    placement = replace(
        last,
        source="sublayer" if given.get("query_before_ln") and not is_parallel else last.source,
        # A parallel child's residual is r, and s is added after the fusion.
        residual="sum" if is_parallel else last.residual,
    )
    return FusionEdit(
        placement,
        query=take("query.weight", hidden, hidden),
        query_bias=take("query.bias", hidden),
        key=take("key.weight", hidden, hidden),
        key_bias=take("key.bias", hidden),
        value=take("value.weight", hidden, hidden),
    )


METHOD = Method(
    name="fusion",
    summary="attention over its children's bottlenecks",
    fields={**ENVELOPE, "adapter_names": no_effect},
    lower=lower,
    file="adapter_fusion_config.json",
)
