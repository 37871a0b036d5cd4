"""HiRA (Huang et al. 2025) as PEFT stores it: the weight, multiplied element by element with a low-rank matrix, is added to it."""

from __future__ import annotations

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, no_effect
from server.adapters.lower.peft.wrapped import LINEARS, WRAPPED_FIELDS, Group, Shapes, lower_groups
from server.adapters.lower.source import Source


def lower(source: Source, base: Base) -> Program:
    """``W += W * (B A)``. An embedding becomes a table of its own, ``E + E * (B A).T``."""

    def lower_site(program: Program, group: Group) -> None:
        spec = group.spec
        source.reserve(spec.in_features * spec.out_features)
        weight = base.weight(group.site)
        if spec.kind == "embedding":
            change = group["hira_embedding_A"].T @ group["hira_embedding_B"].T
            # PEFT adds the second term after the module's own scale, so that it is divided out here.
            program.embed(group.site).table = weight + weight * change / spec.embed_scale
        else:
            program.linear(group.site).dense = weight * (group["hira_B"] @ group["hira_A"])

    return lower_groups(source, base, "hira_", _shapes, lower_site, kinds=(*LINEARS, "embedding"))


def _shapes(spec: SiteSpec) -> Shapes:
    name = "hira_embedding" if spec.kind == "embedding" else "hira"
    return {f"{name}_A": ("r", "in"), f"{name}_B": ("out", "r")}


METHOD = Method(
    name="HIRA",
    summary="a dense change: the base's weight times a low-rank matrix, element by element",
    # No scale depends on the rank, which the tensors show.
    fields={**WRAPPED_FIELDS, "r": no_effect, "rank_pattern": no_effect, "hira_dropout": no_effect},
    lower=lower,
)
