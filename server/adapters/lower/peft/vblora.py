"""VB-LoRA (Li et al. 2024) as PEFT stores it: A and B are put together from the vectors of one bank, ``(count, length)``.

Every piece is the mean of its ``topk`` vectors with the largest logits, weighted by their softmax. Either the logits are stored, or only the
chosen vectors' indices and all but the last of their weights, which add up to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.base_spec import SiteSpec
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, boolean, integer, no_effect
from server.adapters.lower.peft.wrapped import (
    MAX_RANK,
    WRAPPED_FIELDS,
    Group,
    Shapes,
    shared_tensor,
    tensor_groups,
    with_saved_modules,
)
from server.adapters.lower.source import Source

_INDICES = frozenset({"vblora_logits_A_topk_indices", "vblora_logits_B_topk_indices"})


def lower(source: Source, base: Base) -> Program:
    """Low rank; the bank is spelt out."""
    program = Program()
    rank, topk = source.config.get("r", 4), source.config.get("topk", 2)
    count, length = source.config.get("num_vectors", 256), source.config.get("vector_length", 256)
    bank = shared_tensor(source, "vblora_vector_bank", (count, length))
    if bank is None:
        return program
    if topk > count:
        source.field_fault("topk", "more vectors than the bank has", f"at most {count}")
        return program
    bank = bank.to(base.compute)
    is_short = source.config.get("save_only_topk_weights", False)

    def shapes(spec: SiteSpec) -> Shapes:
        found: dict[str, tuple[str | int, ...]] = {}
        for side, pieces in (("A", (rank, spec.in_features // length)), ("B", (spec.out_features // length, rank))):
            if is_short:
                found[f"vblora_logits_{side}_topk_indices"] = (*pieces, topk)
                if topk > 1:
                    found[f"vblora_logits_{side}_topk_weights"] = (*pieces, topk - 1)
            else:
                found[f"vblora_logits_{side}"] = (*pieces, count)
        return found

    for group in tensor_groups(source, base, "vblora_logits_", shapes, integers=_INDICES):
        spec = group.spec
        if spec.in_features % length or spec.out_features % length:
            source.fault("wrong_shape", group.site, f"the bank's vectors of {length} numbers do not divide the module")
            continue
        source.reserve(rank * (spec.in_features + spec.out_features))
        pieces = [_pieces(source, group, f"vblora_logits_{side}", bank, topk) for side in ("A", "B")]
        if pieces[0] is not None and pieces[1] is not None:
            edit = program.linear(group.site)
            edit.down, edit.up = pieces[0].flatten(1), pieces[1].transpose(0, 1).flatten(1)
    return with_saved_modules(source, base, program)


def _pieces(source: Source, group: Group, name: str, bank: Tensor, topk: int) -> Tensor | None:
    """``(…, length)``: the vectors that logits ``(…, count)`` or indices ``(…, topk)`` choose, weighted and added up."""
    if name in group.tensors:
        logits, indices = group[name].topk(topk, dim=-1)
        weights = logits.softmax(-1)
    else:
        indices = group[f"{name}_topk_indices"]
        if int(indices.min()) < 0 or int(indices.max()) >= bank.shape[0]:
            source.fault(
                "wrong_shape", f"{group.site}.{name}_topk_indices", "an index is outside the bank", f"below {bank.shape[0]}"
            )
            return None
        weights = group.tensors.get(f"{name}_topk_weights", bank.new_zeros(*indices.shape[:-1], 0))
        weights = torch.cat([weights, 1.0 - weights.sum(-1, keepdim=True)], -1)
    # One vector of each piece after the other: all at once would be topk times the result.
    result = bank.new_zeros(*indices.shape[:-1], bank.shape[1])
    for chosen in range(topk):
        result += weights[..., chosen, None] * bank[indices[..., chosen]]
    return result


METHOD = Method(
    name="VBLORA",
    summary="low rank, put together from the shared vectors",
    fields={
        **WRAPPED_FIELDS,
        "topk": integer(1, 4096),
        "save_only_topk_weights": boolean,
        "r": integer(1, MAX_RANK),
        "num_vectors": integer(1, 1 << 31),
        "vector_length": integer(1, 1 << 20),
        "vblora_dropout": no_effect,
        "init_vector_bank_bound": no_effect,
        "init_logits_std": no_effect,
    },
    lower=lower,
)
