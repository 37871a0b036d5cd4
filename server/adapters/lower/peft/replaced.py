"""What PEFT checkpoints replace outright, beside any method's own tensors: biases, whole modules, rows of the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import HeadEdit, NormEdit, Program
from server.adapters.lower.base import Base, stored_shape
from server.adapters.lower.source import Source

_ROWS = "token_adapter.trainable_tokens_delta"


def lower_biases(source: Source, base: Base, program: Program) -> None:
    """``bias="lora_only"`` and ``"all"`` store replaced biases: ``base_layer.bias`` where a module was wrapped, ``bias`` elsewhere."""
    for spec in source.sites():
        site = spec.name
        for tail in ("base_layer.bias", "bias"):
            # A bias that comes with its weight is part of a replaced module.
            if not source.has(site, tail) or (tail == "bias" and source.has(site, "weight")):
                continue
            bias = source.take(site, tail, (spec.out_features,))
            if bias is None:
                continue
            if not spec.has_bias:
                source.fault(
                    "unmatched_tensor", f"{site}.{tail}", "the base model has no bias here to replace; leave the tensor out"
                )
            elif spec.kind == "norm":
                program.add(site, NormEdit(bias=bias))
            else:
                _shift(program, site, bias.to(base.compute) - base.bias(site))


def lower_replaced_modules(source: Source, base: Base, program: Program) -> None:
    """``modules_to_save``, and ``base_layer.weight`` of wrapped embeddings and heads, which usually equals the base's."""
    for spec in source.sites():
        site = spec.name
        for tail in ("weight", "base_layer.weight"):
            if not source.has(site, tail):
                continue
            if tail == "weight" and spec.kind == "linear" and site in program.edits:
                source.fault(
                    "duplicate_tensor",
                    f"{site}.weight",
                    "the module is replaced as a whole, and changed by the method too; leave it out of modules_to_save or target_modules",
                )
                continue
            weight = source.take(site, tail, stored_shape(spec))
            bias = source.take(site, "bias", (spec.out_features,)) if tail == "weight" else None
            if weight is not None and (
                spec.kind in ("norm", "linear") or not torch.equal(base.as_served(weight), base.weight(site)) or bias is not None
            ):
                _replace(program, spec, weight.to(base.compute), bias, base)


def lower_token_rows(
    source: Source, base: Base, program: Program, indices: Any, *, field: str = "trainable_token_indices", tail: str = _ROWS
) -> None:
    """``trainable_token_indices``: replacement rows, whose ids only the config knows; a tied head's rows are replaced with them."""
    embedding, head = base.spec.embedding, base.spec.head
    width = base.spec.hidden_size
    found = False
    for site in (embedding, head):
        ids = _row_ids(indices, site, embedding)
        if not source.has(site, tail):
            continue
        if not ids or max(ids) >= base.spec.vocab_size or len(set(ids)) != len(ids):
            source.field_fault(field, f"distinct ids below {base.spec.vocab_size} are needed for {site}")
            continue
        rows = source.take(site, tail, (len(ids), width))
        if rows is None:
            continue
        order = torch.tensor(ids).argsort()
        row_ids, rows = torch.tensor(ids)[order], rows.to(base.compute)[order]
        if site == embedding:
            edit = program.embed(site)
            edit.row_ids, edit.rows = row_ids, rows
        if site == head or (base.spec.tied_head and not source.has(head, tail)):
            program.add(head, HeadEdit(row_ids=row_ids, rows=rows))
        found = True
    if indices and not found:
        source.field_fault(field, f"the checkpoint lacks {tail} for these tokens")


def _row_ids(indices: Any, site: str, embedding: str) -> list[int]:
    if isinstance(indices, list):
        return list(indices)
    if isinstance(indices, dict):
        for name, ids in indices.items():
            if ("." + site).endswith("." + name):
                return list(ids)
        # A tied head repeats the embedding's rows without an entry of its own.
        if site != embedding and len(indices) == 1:
            return list(next(iter(indices.values())))
    return []


def _replace(program: Program, spec: SiteSpec, weight: Tensor, bias: Tensor | None, base: Base) -> None:
    if spec.kind == "norm":
        program.add(spec.name, NormEdit(weight=weight, bias=bias))
    elif spec.kind == "embedding":
        program.embed(spec.name).table = weight
    elif spec.kind == "head":
        program.add(spec.name, HeadEdit(weight=weight, bias=bias))
    else:
        stored = weight.T if spec.transposed else weight
        edit = program.linear(spec.name)
        dense = stored - base.weight(spec.name)
        edit.dense = dense if edit.dense is None else edit.dense + dense
        if bias is not None:
            _shift(program, spec.name, bias.to(base.compute) - base.bias(spec.name))


def _shift(program: Program, site: str, shift: Tensor) -> None:
    edit = program.linear(site)
    edit.shift = shift if edit.shift is None else edit.shift + shift
