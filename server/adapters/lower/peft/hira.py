"""HiRA (Huang et al. 2025) as PEFT stores it: the weight, multiplied element by element with a low-rank matrix, is added to it."""

from __future__ import annotations

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.delta import add_dense, linears_with, take_all
from server.adapters.lower.method import COMMON_FIELDS, Method, no_effect
from server.adapters.lower.peft.replaced import lower_replaced_modules
from server.adapters.lower.source import Source

_LINEAR = ("hira_A", "hira_B")
_EMBEDDING = ("hira_embedding_A", "hira_embedding_B")


def lower(source: Source, base: Base) -> Program:
    """``W += W * (B A)``; an embedding becomes a table of its own."""
    program = Program()
    for spec in linears_with(source, base, *_LINEAR):
        shapes = dict(zip(_LINEAR, ((None, spec.in_features), (spec.out_features, None)), strict=True))
        found = take_all(source, spec.name, shapes)
        if found is None or not _same_rank(source, spec, found[0].shape[0], found[1].shape[1]):
            continue
        down, up = (tensor.to(base.compute) for tensor in found)
        add_dense(program.linear(spec.name), base.weight(spec.name) * (up @ down))
    embedding = base.spec.site(base.spec.embedding)
    if embedding is not None and any(source.has(embedding.name, tail) for tail in _EMBEDDING):
        _lower_embedding(source, base, program, embedding)
    lower_replaced_modules(source, base, program)
    return program


def _lower_embedding(source: Source, base: Base, program: Program, spec: SiteSpec) -> None:
    """``E + E * (B A).T``. PEFT adds the second term after the module's own scale, so that it is divided out here."""
    shapes = dict(zip(_EMBEDDING, ((None, spec.in_features), (spec.out_features, None)), strict=True))
    found = take_all(source, spec.name, shapes)
    if found is None or not _same_rank(source, spec, found[0].shape[0], found[1].shape[1]):
        return
    down, up = (tensor.to(base.compute) for tensor in found)
    weight = base.weight(spec.name)
    program.embed(spec.name).table = weight + weight * (down.T @ up.T) / spec.embed_scale


def _same_rank(source: Source, spec: SiteSpec, first: int, second: int) -> bool:
    if first == second and first > 0:
        return True
    source.fault("wrong_rank", spec.name, "the two matrices have different ranks", str(first), str(second))
    return False


METHOD = Method(
    name="HIRA",
    summary="a dense change: the base's weight times a low-rank matrix, element by element",
    fields={
        **COMMON_FIELDS,
        "modules_to_save": no_effect,
        # No scale depends on the rank, which the tensors' shapes say.
        "r": no_effect,
        "rank_pattern": no_effect,
        **dict.fromkeys(("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"), no_effect),
        **dict.fromkeys(("hira_dropout", "fan_in_fan_out", "init_weights"), no_effect),
    },
    lower=lower,
)
