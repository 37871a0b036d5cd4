"""Alone == packed: what a request gets does not depend on its neighbours, however hostile. In fp64, where rounding cannot hide a leak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.adapters.ir import LinearEdit, Program
from server.adapters.kernels import LowRankRows, lowrank_concat, lowrank_gather, lowrank_reference
from server.adapters.program_file import write_program
from server.engine.types import BASE, FinishReason, ProgramRef, Request
from tests.conftest import TinyModels
from tests.harness import Result, greedy, load_base_for_lowering, lower_directory, make_engine, run
from tests.parity.variants import INVOCATION, VARIANTS, make_adapter
from tests.tiny import FAMILIES

NAMES = ("plain", "rslora", "patterns", "one-layer", "dora", "embedding", "token-rows", "activated", "adalora", "pissa")
TOLERANCE = 1e-10


def prompt(length: int, salt: int) -> list[int]:
    return [(salt * 31 + 7 * index * index + index) % 250 + 5 for index in range(length)]


def programs(family: str, base: Path, directory: Path) -> dict[str, ProgramRef]:
    """One program of every variant that the family has, lowered for an fp64 base."""
    spec = load_base_for_lowering(base, "float64")
    made = {}
    for variant in VARIANTS:
        if variant.name in NAMES and (variant.families is None or family in variant.families):
            made[variant.name] = lower_directory(
                make_adapter(variant, family, base, directory / variant.name), spec, variant.name
            )
    return made


def overflowing(base: Path, directory: Path) -> ProgramRef:
    """A program of finite weights whose results overflow."""
    spec = load_base_for_lowering(base, "float64").spec
    program = Program()
    for site in spec.sites:
        if site.kind == "linear":
            huge = {"dtype": torch.float64}
            program.add(
                site.name,
                LinearEdit(
                    down=torch.full((2, site.in_features), 1e200, **huge), up=torch.full((2, site.out_features), 1e200, **huge)
                ),
            )  # type: ignore[arg-type]
    write_program(directory / "overflow.safetensors", program, program_id="overflow", facts={})
    return ProgramRef("overflow", str(directory / "overflow.safetensors"))


def same(alone: Result, packed: Result) -> None:
    assert packed.error is None
    assert packed.tokens == alone.tokens
    difference = (torch.stack(packed.logits) - torch.stack(alone.logits)).abs().max()
    assert float(difference) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_with_hostile_neighbours_equals_alone(family: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models(family)
    refs = {**programs(family, base, tmp_path), "base": BASE}
    requests = [
        greedy(
            f"{name}-{length}", prompt(length, index) if name != "activated" else [9, 8, *INVOCATION, *prompt(length, index)], ref
        )
        for index, (name, ref) in enumerate(refs.items())
        for length in (3, 37)
    ]
    engine = make_engine(base, "float64")
    alone: dict[str, Result] = {}
    for request in requests:
        alone |= run(engine, [request])
    engine.close()
    hostile = [greedy(f"hostile-{index}", prompt(150, 90 + index), overflowing(base, tmp_path)) for index in range(3)]
    hostile.append(greedy("hostile-long", prompt(400, 77), refs["dora"], tokens=40))
    engine = make_engine(base, "float64", prefix_caching=False)
    packed = run(engine, [*hostile, *requests])
    engine.close()
    for request in requests:
        same(alone[request.request_id], packed[request.request_id])
    for index in range(3):
        failed = packed[f"hostile-{index}"]
        assert failed.finish_reason is FinishReason.ERROR
        assert failed.error is not None
        assert failed.error.code == "non_finite_output"


@pytest.mark.parametrize("kernel", [lowrank_reference, lowrank_gather, lowrank_concat])
def test_every_kernel_gives_the_same_and_is_the_one_that_ran(
    kernel: Callable[..., None], tiny_models: TinyModels, tmp_path: Path
) -> None:
    base = tiny_models("llama")
    refs = programs("llama", base, tmp_path)
    requests = [greedy(f"{name}-{length}", prompt(length, 5), ref) for name, ref in refs.items() for length in (1, 9)]
    calls = 0

    def counted(y: Tensor, x: Tensor, down: Tensor, up: Tensor, index: LowRankRows) -> None:
        nonlocal calls
        calls += 1
        kernel(y, x, down, up, index)

    chosen, forced = make_engine(base, "float64"), make_engine(base, "float64", kernel=counted)
    expected, found = run(chosen, requests), run(forced, requests)
    chosen.close()
    forced.close()
    assert calls
    for name, result in expected.items():
        same(result, found[name])


def test_preemption_and_recomputation_change_nothing(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    refs = programs("llama", base, tmp_path)
    requests = [greedy(f"{index}", prompt(30, index), ref, tokens=40) for index, ref in enumerate(refs.values())]
    roomy = make_engine(base, "float64")
    # Room for one long request and little more, so that the running ones push each other out.
    tight = make_engine(base, "float64", kv_cache_bytes=14 * 2 * 2 * 2 * 16 * 8 * 8, max_model_len=128)
    expected, found = run(roomy, requests), run(tight, requests)
    assert tight.scheduler.num_preemptions
    assert tight.blocks.num_used == 0
    roomy.close()
    tight.close()
    for name, result in expected.items():
        same(result, found[name])


def test_prefix_cache_is_per_tenant_and_per_program(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    refs = programs("llama", base, tmp_path)
    engine = make_engine(base, "float64")
    shared = prompt(64, 3)

    def ask(request_id: str, ref: ProgramRef, tenant: str, tokens: list[int] = shared) -> Result:
        return run(engine, [greedy(request_id, tokens, ref, tenant=tenant)])[request_id]

    cold = ask("a", refs["plain"], "acme")
    warm = ask("b", refs["plain"], "acme")
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 48)
    same(cold, warm)
    assert ask("c", refs["plain"], "other").num_cached_tokens == 0
    assert ask("d", refs["rslora"], "acme").num_cached_tokens == 0
    engine.close()


def test_activated_program_shares_the_bases_cache_before_its_start(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    activated = programs("llama", base, tmp_path)["activated"]
    engine = make_engine(base, "float64")
    tokens = [*prompt(40, 3), *INVOCATION, *prompt(10, 4)]
    run(engine, [greedy("base", tokens, BASE, tenant="acme")])
    result = run(engine, [greedy("activated", tokens, activated, tenant="acme")])["activated"]
    assert result.num_cached_tokens == 32  # the two whole blocks before position 40
    fresh = make_engine(base, "float64", prefix_caching=False)
    same(run(fresh, [greedy("activated", tokens, activated, tenant="acme")])["activated"], result)
    absent = run(engine, [greedy("absent", prompt(40, 3), activated, tenant="acme")])["absent"]
    plain = run(fresh, [greedy("absent", prompt(40, 3), BASE)])["absent"]
    same(plain, absent)
    engine.close()
    fresh.close()


def test_more_programs_than_the_bank_holds(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    refs = programs("llama", base, tmp_path)
    requests: list[Request] = [
        greedy(f"{round_}-{name}", prompt(10 + round_, 5), ref)
        for round_ in range(3)
        for name, ref in refs.items()
        if name != "embedding"
    ]
    roomy = make_engine(base, "float64")
    tight = make_engine(base, "float64", max_slots=2, host_bytes=1)
    expected, found = run(roomy, requests), run(tight, requests, max_steps=20000)
    roomy.close()
    stats: Any = tight.stats()
    assert stats.counters["evictions"] > 3
    assert stats.slots_pinned == 0
    tight.close()
    for name, result in expected.items():
        same(result, found[name])
