"""Bottlenecks of many programs in one batch equal the reference of each alone: every placement, norms, weights, long and short runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from server.adapters.apply import StepEdits
from server.adapters.bank import Bank
from server.adapters.base_spec import SiteSpec
from server.adapters.bottleneck import (
    Group,
    SublayerWork,
    bottleneck_reference,
    fusion_reference,
    run_sublayer,
    sublayer_work,
)
from server.adapters.ir import BottleneckEdit, FusionEdit, Placement, Program
from server.adapters.kernels import Kernel, NativeEdits, lowrank_concat, lowrank_gather, lowrank_reference
from server.adapters.native_bottleneck import NativeGroup
from server.adapters.packed import pack_program
from server.adapters.streams import Streams
from tests.kernels import KERNELS
from tests.server.adapters.conftest import native as load
from tests.server.adapters.conftest import small_spec

HIDDEN, SITE = 12, "out"
SPEC = small_spec(HIDDEN, SiteSpec(SITE, "linear", HIDDEN, HIDDEN, False, 0), dtype="float64")
STREAMS = ("sublayer", "residual", "sum", "normed")


def normed(x: Tensor) -> Tensor:
    return F.layer_norm(x, (HIDDEN,))


def edit(draw: st.DrawFn, seed: int) -> BottleneckEdit:
    generator = torch.Generator().manual_seed(seed)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    placement = Placement(
        activation=draw(st.sampled_from(("relu", "gelu", "gelu_new", "silu", "tanh", "linear", "leakyrelu"))),
        source=draw(st.sampled_from(STREAMS)),  # type: ignore[arg-type]
        residual=draw(st.sampled_from(("sublayer", "sum", "normed"))),  # type: ignore[arg-type]
        norm_first=draw(st.booleans()),
        replaces=draw(st.booleans()),
    )
    rank, has = draw(st.integers(1, 5)), [draw(st.booleans()) for _ in range(4)]
    return BottleneckEdit(
        placement,
        r(rank, HIDDEN),
        r(rank, HIDDEN),
        r(rank) if has[0] else None,
        r(HIDDEN) if has[1] else None,
        *((r(HIDDEN), r(HIDDEN)) if has[2] else (None, None)),
        *((r(HIDDEN), r(HIDDEN)) if has[3] else (None, None)),
        weight=draw(st.sampled_from((1.0, 1.0, 0.5))),
    )


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[list[BottleneckEdit], int]]:
    """Programs with one or two bottlenecks, and how many rows each owns; no edits: the base's rows."""
    found = []
    for index in range(draw(st.integers(1, 6))):
        edits = [edit(draw, 10 * index + number) for number in range(draw(st.integers(0, 2)))]
        if len(edits) == 2:
            edits = [replace(item, placement=replace(item.placement, replaces=False)) for item in edits]
        found.append((edits, draw(st.sampled_from((1, 1, 2, 20)))))
    return found


@pytest.fixture(scope="module")
def native() -> NativeEdits:
    return load(KERNELS, torch.float32)


@pytest.mark.parametrize("kernel", [None, lowrank_reference, lowrank_gather, lowrank_concat])
@settings(max_examples=60)
@given(batch=programs())
def test_packed_equals_the_reference_of_each(kernel: Kernel | None, batch: list[tuple[list[BottleneckEdit], int]]) -> None:
    work = check_packed(kernel, batch, torch.float64, tolerance=1e-9)
    assert work is None or all(isinstance(group, Group) for group in work.groups)


@settings(max_examples=60, deadline=None)
@given(batch=programs())
def test_the_native_kernel_equals_the_reference_of_each(
    native: NativeEdits, batch: list[tuple[list[BottleneckEdit], int]]
) -> None:
    work = check_packed(native, batch, torch.float32, tolerance=1e-4)
    activations = {item.placement.activation for edits, _ in batch for item in edits}
    kinds = {type(group) for group in work.groups} if work is not None else set()
    assert (NativeGroup in kinds) == bool(activations - {"leakyrelu"})
    assert (Group in kinds) == ("leakyrelu" in activations)


def check_packed(
    kernel: Kernel | None, batch: list[tuple[list[BottleneckEdit], int]], dtype: torch.dtype, tolerance: float
) -> SublayerWork | None:
    bank = Bank(SPEC, capacity_bytes=1 << 20, max_slots=16, dtype=dtype, device=torch.device("cpu"))
    runs, row = [], 0
    for index, (edits, count) in enumerate(batch):
        slot = 0
        if edits:
            program = Program()
            for item in edits:
                program.add(SITE, item)
            resident = bank.admit(pack_program(program, program_id=str(index))).resident
            assert resident is not None
            slot = resident.slot
        runs.append((slot, row, row + count))
        row += count
    generator = torch.Generator().manual_seed(1)
    s, r = (torch.randn(row, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(2))
    work = sublayer_work(StepEdits(bank, runs, kernel), SITE, HIDDEN)
    given, beside = s.to(dtype), r.to(dtype)
    streams = Streams(given, beside, lambda: normed(given + beside))
    result = run_sublayer(work, streams, bank.vectors) if work is not None else None
    whole = {
        index
        for rows in (result.whole if result is not None else ())
        for index in (range(row) if rows is None else rows.tolist())
    }
    for (edits, _), (_, start, end) in zip(batch, runs, strict=True):
        expected = s[start:end].clone()
        for item in edits:
            part = Streams(s[start:end], r[start:end], lambda start=start, end=end: normed((s + r)[start:end]))
            expected += bottleneck_reference(item, part) - s[start:end]
        found = s if result is None else result.t
        torch.testing.assert_close(found[start:end].double(), expected, rtol=tolerance, atol=tolerance)
        replaced = any(item.placement.replaces for item in edits)
        assert all((index in whole) == replaced for index in range(start, end))
    return work


def test_a_fusion_attends_over_its_children_beside_other_programs() -> None:
    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    torch.manual_seed(0)
    children = [BottleneckEdit(Placement("relu", source="sum"), r(2, HIDDEN), r(2, HIDDEN), r(2), r(HIDDEN)) for _ in range(3)]
    fusion = FusionEdit(Placement(source="sum"), r(HIDDEN, HIDDEN), r(HIDDEN), r(HIDDEN, HIDDEN), r(HIDDEN), r(HIDDEN, HIDDEN))
    fused, plain = Program(), Program()
    for item in [*children, fusion]:
        fused.add(SITE, item)
    plain.add(SITE, children[0])
    bank = Bank(SPEC, capacity_bytes=1 << 20, max_slots=4, dtype=torch.float64, device=torch.device("cpu"))
    slots = []
    for name, program in (("fused", fused), ("plain", plain)):
        resident = bank.admit(pack_program(program, program_id=name)).resident
        assert resident is not None
        slots.append(resident.slot)
    s, residual = r(4, HIDDEN), r(4, HIDDEN)
    work = sublayer_work(StepEdits(bank, [(0, 0, 1), (slots[0], 1, 3), (slots[1], 3, 4)]), SITE, HIDDEN)
    assert work is not None
    t = run_sublayer(work, Streams(s, residual), bank.vectors).t
    torch.testing.assert_close(t[0], s[0])
    torch.testing.assert_close(t[1:3], fusion_reference(children, fusion, Streams(s[1:3], residual[1:3])))
    torch.testing.assert_close(t[3:], bottleneck_reference(children[0], Streams(s[3:], residual[3:])))


@pytest.mark.parametrize("activation", ["linear", "relu", "gelu", "gelu_new", "silu", "tanh", "leakyrelu", "quick_gelu"])
def test_activations_are_those_of_pytorch(activation: str, native: NativeEdits) -> None:
    spec = replace(SPEC, dtype="float32")
    torch.manual_seed(0)
    program = Program()
    item = BottleneckEdit(Placement(activation), torch.randn(5, HIDDEN), torch.randn(5, HIDDEN), torch.randn(5))
    program.add(SITE, item)
    bank = Bank(spec, capacity_bytes=1 << 20, max_slots=4, dtype=torch.float32, device=torch.device("cpu"))
    resident = bank.admit(pack_program(program, program_id="p")).resident
    assert resident is not None
    s = torch.randn(3, HIDDEN)
    work = sublayer_work(StepEdits(bank, [(resident.slot, 0, 3)], native), SITE, HIDDEN)
    assert work is not None
    assert isinstance(work.groups[0], Group if activation in ("leakyrelu", "quick_gelu") else NativeGroup)
    streams = Streams(s, None)
    torch.testing.assert_close(run_sublayer(work, streams, bank.vectors).t, bottleneck_reference(item, streams))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_is_not_finite_stays_alone(dtype: torch.dtype) -> None:
    kernel = load(KERNELS, dtype)
    placement = Placement("gelu", source="sum", residual="normed")
    item = BottleneckEdit(placement, *torch.randn(2, 5, HIDDEN), after_weight=torch.randn(HIDDEN), weight=0.5)
    program = Program()
    program.add(SITE, item)
    bank = Bank(replace(SPEC, dtype="float32"), capacity_bytes=1 << 20, max_slots=4, dtype=dtype, device=torch.device("cpu"))
    resident = bank.admit(pack_program(program, program_id="p")).resident
    assert resident is not None
    work = sublayer_work(StepEdits(bank, [(resident.slot, 0, 6), (0, 6, 8)], kernel), SITE, HIDDEN)
    assert work is not None
    s, r = torch.randn(2, 8, HIDDEN).to(dtype)
    s[1], r[3], s[7] = float("nan"), float("inf"), float("nan")
    t = run_sublayer(work, Streams(s, r, lambda: normed(s + r)), bank.vectors).t
    assert torch.isfinite(t).all(-1).tolist() == [row not in (1, 3, 7) for row in range(8)]
