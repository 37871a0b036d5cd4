"""A program from a file is taken only if every place that it names lies within it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from server.adapters.ir import BottleneckEdit, HeadLayer, LinearEdit, NormEdit, Placement, Program, Prologue, TaskHead
from server.adapters.packed import PackedProgram, PrologueLayout, pack_program
from server.adapters.program_check import check_program
from tests.conftest import TinyModels
from tests.harness import load_base_for_lowering

R = torch.randn
SITE, OUT = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def with_site(packed: PackedProgram, site: str, **changes: Any) -> PackedProgram:
    return replace(packed, layouts={**packed.layouts, site: replace(packed.layouts[site], **changes)})


def with_bottleneck(packed: PackedProgram, **changes: Any) -> PackedProgram:
    return with_site(packed, OUT, bottlenecks=(replace(packed.layouts[OUT].bottlenecks[0], **changes),))


def with_extra(packed: PackedProgram, site: str, name: str, tensor: torch.Tensor) -> PackedProgram:
    return replace(packed, extras={**packed.extras, packed.layouts[site].extras[name]: tensor})


FAULTS: dict[str, Callable[[PackedProgram], PackedProgram]] = {
    "rows of two dimensions": lambda p: replace(p, rows=p.rows.view(1, -1)),
    "vectors that are whole numbers": lambda p: replace(p, vectors=p.vectors.long()),
    "a site that there is not": lambda p: replace(p, layouts={"model.layers.9": p.layouts[SITE]}),
    "down far beyond the end": lambda p: with_site(p, SITE, down=10**9 // 32 * 32),
    "up one rank beyond the end": lambda p: with_site(p, SITE, rank=p.layouts[SITE].rank + 100),
    "down before the beginning": lambda p: with_site(p, SITE, down=-32),
    "down between two rows": lambda p: with_site(p, SITE, down=1),
    "a rank that is no number": lambda p: with_site(p, SITE, rank="x"),
    "an offset that is a fraction": lambda p: with_site(p, SITE, shift=0.5),
    "a shift beyond the end": lambda p: with_site(p, SITE, shift=p.vectors.numel() - 1),
    "pairs in groups that are none": lambda p: with_site(p, SITE, pair_scale=0, pair_group=3),
    "a norm of another width": lambda p: with_extra(p, "model.norm", "norm.weight", R(3)),
    "a norm of another dtype": lambda p: with_extra(p, "model.norm", "norm.weight", R(32).double()),
    "a norm's parameter at a linear": lambda p: with_site(
        p, SITE, extras={"norm.weight": p.layouts["model.norm"].extras["norm.weight"]}
    ),
    "a bottleneck where no sub-layer ends": lambda p: with_site(p, SITE, bottlenecks=p.layouts[OUT].bottlenecks),
    "an extra that is not there": lambda p: replace(p, extras={}),
    "a stream that is none": lambda p: with_bottleneck(p, placement=replace(p.layouts[OUT].bottlenecks[0].placement, source="x")),
    "a weight that is no number": lambda p: with_bottleneck(p, weight=float("nan")),
    "a bottleneck beyond the end": lambda p: with_bottleneck(p, up=p.rows.numel() // 32 * 32),
    "a bias beyond the end": lambda p: with_bottleneck(p, down_bias=p.vectors.numel()),
    "num_kv that is no number": lambda p: replace(p, prologue=PrologueLayout("x", 4)),  # type: ignore[arg-type]
    "more K/V than there is": lambda p: replace(p, prologue=replace(p.prologue, num_kv=4)),
    "more virtual tokens than there are": lambda p: replace(p, prologue=replace(p.prologue, num_tokens=5)),
    "a token that is no number": lambda p: replace(p, invocation_tokens=("x",)),  # type: ignore[arg-type]
    "a classifier without weights": lambda p: replace(p, head=p.head and replace(p.head, activations=("tanh", "tanh"))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_program_that_names_what_it_has_not_is_refused(fault: str, tiny_models: TinyModels) -> None:
    spec = load_base_for_lowering(tiny_models("llama")).spec
    site, width = spec.by_name()[SITE], spec.hidden_size
    program = Program()
    program.add(SITE, LinearEdit(down=R(3, site.in_features), up=R(3, site.out_features), shift=R(site.out_features)))
    program.add(OUT, BottleneckEdit(Placement(), R(2, width), R(2, width), R(2)))
    program.add("model.norm", NormEdit(weight=R(width)))
    program.prologue = Prologue(R(spec.num_layers, 2, spec.num_kv_heads, 3, spec.head_dim), R(4, width), spec.embedding)
    program.head = TaskHead("mean", [HeadLayer(R(2, width))])
    packed = pack_program(program, program_id="p")
    check_program(packed, spec)
    with pytest.raises(ValueError, match=r"."):
        check_program(FAULTS[fault](packed), spec)
