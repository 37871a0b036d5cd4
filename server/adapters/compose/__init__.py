"""Composition: one program that acts like several adapters added up, and programs without their first layers.

At every site ``y = y0 + sum_i w_i (edit_i(x) - y0)``, where ``y0`` is what the base makes of the same input. What this cannot express
exactly is refused. A bottleneck stands behind the linear or the norm of its site, and so reads what other adapters made of that. Knows
programs and the base; no adapter's name, no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from server.adapters.base_spec import BaseSpec
from server.adapters.compose.linear import compose_linear
from server.adapters.compose.placed import compose_bottlenecks, compose_intervention, compose_side
from server.adapters.compose.share import Conflict, Share, shares_of, who
from server.adapters.compose.vocabulary import compose_embedding, compose_head
from server.adapters.faults import Fault, LoweringError
from server.adapters.identity import MAX_ADAPTERS, MAX_WEIGHT
from server.adapters.ir import EmbedEdit, HeadEdit, InterventionEdit, LinearEdit, NormEdit, Program, Prologue, SideEdit
from server.adapters.lower import MAX_PROGRAM_BYTES, cast
from server.adapters.lower.base import Base

__all__ = ["Part", "compose", "drop_layers"]


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter's program and its weight, finite and at most MAX_WEIGHT in size. Programs hold one edit of a kind at a site, beside bottlenecks."""

    program: Program
    weight: float = 1.0


def compose(parts: Sequence[Part], base: Base, *, max_bytes: int = MAX_PROGRAM_BYTES) -> Program:
    """The program of several adapters together. Raises LoweringError with every conflict; adapters are named by their index.

    What a single part with weight 1 edits is passed on as it is. ``max_bytes`` is watched while the program grows.
    """
    if not 1 <= len(parts) <= MAX_ADAPTERS:
        raise _refusal("adapters", f"one to {MAX_ADAPTERS} adapters can be combined", str(len(parts)))
    if any(not math.isfinite(part.weight) or abs(part.weight) > MAX_WEIGHT for part in parts):
        raise _refusal("adapters", f"weights are finite numbers from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    faults: list[Fault] = []
    result = Program()
    nbytes = 0
    for site in dict.fromkeys(site for part in parts for site in part.program.edits):
        try:
            _compose_site(site, parts, base, result)
        except Conflict as conflict:
            faults.append(Fault("not_composable", site, str(conflict)))
        tensors = Program({site: result.edits.get(site, [])}).tensors()
        nbytes += sum(tensor.numel() for *_, tensor in tensors) * base.dtype.itemsize
        if nbytes > max_bytes:
            raise LoweringError([_too_large(max_bytes)])
    for rule in (_compose_prologue, _compose_head, _compose_invocation):
        try:
            rule(parts, result)
        except Conflict as conflict:
            faults.append(Fault("not_composable", "adapters", str(conflict)))
    faults += _side_faults(parts, base.spec)
    if faults:
        raise LoweringError(faults)
    for index, part in enumerate(parts):
        result.notes |= {f"adapters[{index}].{name}": note for name, note in part.program.notes.items()}
    result = cast(result, base)
    if (where := result.first_non_finite()) is not None:
        raise _refusal(where, f"the composition overflows in {base.spec.dtype}; use smaller weights")
    if result.nbytes > max_bytes:
        raise LoweringError([_too_large(max_bytes)])
    return result


def drop_layers(program: Program, spec: BaseSpec, count: int) -> Program:
    """The program without its edits in the first ``count`` layers (AdapterDrop, Rücklé et al. 2021). Raises LoweringError."""
    if not 0 <= count <= spec.num_layers:
        raise _refusal("adapter_drop", f"the base has {spec.num_layers} layers", str(count))
    if count and program.prologue.num_kv:
        raise _refusal("adapter_drop", "a prefix of keys and values acts in every layer and cannot be left out of some")
    sites = spec.by_name()
    kept = {site: edits for site, edits in program.edits.items() if (layer := sites[site].layer) is None or layer >= count}
    return replace(program, edits=kept)


def _compose_site(site: str, parts: Sequence[Part], base: Base, result: Program) -> None:
    """Add the site's composed edits to the result. Raises Conflict."""
    here = [Share(index, part.weight, part.program.edits[site]) for index, part in enumerate(parts) if site in part.program.edits]
    if len(here) == 1 and here[0].weight == 1.0:
        result.edits[site] = list(here[0].edit)
        return
    spec = base.spec.by_name()[site]
    if embeds := shares_of(here, EmbedEdit):
        result.add(site, compose_embedding(embeds, site, base))
    heads = shares_of(here, HeadEdit)
    if heads:
        result.add(site, compose_head(heads, spec, base))
    if norms := shares_of(here, NormEdit):
        result.add(site, _compose_norm(norms, site, base))
    if linears := shares_of(here, LinearEdit):
        result.add(site, compose_linear(linears, spec, base.compute, replaced_by=heads))
    for bottleneck in compose_bottlenecks(here):
        result.add(site, bottleneck)
    if sides := shares_of(here, SideEdit):
        result.add(site, compose_side(sides, base.compute))
    if interventions := shares_of(here, InterventionEdit):
        result.add(site, compose_intervention(interventions, base.compute))


def _compose_norm(shares: Sequence[Share[NormEdit]], site: str, base: Base) -> NormEdit:
    """A norm is linear in its parameters: ``base + sum w (theirs - base)``."""
    found = {}
    for name, own in (("weight", base.weight), ("bias", base.bias)):
        given = [(share.weight, value) for share in shares if (value := getattr(share.edit, name)) is not None]
        if given:
            start = own(site)
            found[name] = start + sum(
                (weight * (value.to(base.compute) - start) for weight, value in given), torch.zeros_like(start)
            )
    return NormEdit(**found)


def _compose_prologue(parts: Sequence[Part], result: Program) -> None:
    """Prologues one after the other: first all keys and values, then all virtual tokens, each in the order of the adapters."""
    here = [Share(index, part.weight, part.program.prologue) for index, part in enumerate(parts) if len(part.program.prologue)]
    if not here:
        return
    first = here[0].edit
    if any(share.weight != 1.0 for share in here):
        raise Conflict(f"virtual tokens and prefixes have no weight but 1 ({who(here)})")
    if any((share.edit.shifts, share.edit.after_first) != (first.shifts, first.after_first) for share in here):
        raise Conflict(f"{who(here)} count the positions behind their virtual tokens or prefixes differently")
    if len({share.edit.tokens_site for share in here if share.edit.num_tokens}) > 1:
        raise Conflict(f"{who(here)} put their virtual tokens in different places")
    tokens_site = next((share.edit.tokens_site for share in here if share.edit.num_tokens), first.tokens_site)
    result.prologue = Prologue(
        _joined([share.edit.kv for share in here], 3),
        _joined([share.edit.tokens for share in here], 0),
        tokens_site,
        first.shifts,
        first.after_first,
    )


def _compose_head(parts: Sequence[Part], result: Program) -> None:
    """A task head reads the hidden states that all adapters made, whatever its adapter's weight."""
    here = [Share(index, part.weight, part.program.head) for index, part in enumerate(parts) if part.program.head is not None]
    if len(here) > 1:
        raise Conflict(f"{who(here)} each have a task head; at most one can be read")
    result.head = here[0].edit if here else None


def _compose_invocation(parts: Sequence[Part], result: Program) -> None:
    tokens = {part.program.invocation_tokens for part in parts}
    if len(tokens) > 1:
        raise Conflict("the adapters start to act at different tokens of the prompt")
    result.invocation_tokens = tokens.pop()
    if result.invocation_tokens and len(result.prologue):
        raise Conflict("adapters that start to act at tokens of the prompt cannot be combined with virtual tokens or prefixes")


def _side_faults(parts: Sequence[Part], spec: BaseSpec) -> list[Fault]:
    """Side attention that passes a projection which somebody else edits would count in that edit, too."""
    sites = spec.by_name()
    faults = []
    for index, part in enumerate(parts):
        for site, edits in part.program.edits.items():
            layer = sites[site].layer
            if layer is None or not any(isinstance(edit, SideEdit) and edit.projected for edit in edits):
                continue
            projection = spec.layer_site(layer, spec.names.attention_out)
            editing = [
                Share(other, item.weight, item.program)
                for other, item in enumerate(parts)
                if (other != index or item.weight != 1.0)
                and any(isinstance(edit, LinearEdit) for edit in item.program.edits.get(projection, ()))
            ]
            if editing:
                message = f"the side attention of adapters[{index}] passes this projection, which {who(editing)} edit"
                faults.append(Fault("not_composable", projection, message))
    return faults


def _joined(tensors: Sequence[Tensor | None], dim: int) -> Tensor | None:
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.cat(found, dim) if found else None


def _refusal(where: str, message: str, found: str | None = None) -> LoweringError:
    return LoweringError([Fault("not_composable", where, message, found=found)])


def _too_large(max_bytes: int) -> Fault:
    return Fault("program_too_large", "adapters", "the composition is too large", f"at most {max_bytes} bytes")
