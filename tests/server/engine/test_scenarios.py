"""Every accepted request ends exactly once and gives everything back, whatever is mixed, cut, preempted, evicted or aborted."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.adapters.ir import HeadLayer, LinearEdit, Program, TaskHead
from server.engine.engine import Engine
from server.engine.types import BASE, FinishReason, ProgramRef, Request, RequestOutput, Task
from tests.conftest import TinyModels
from tests.harness import Result, ask, greedy, load_base_for_lowering, make_engine, run
from tests.server.engine.test_prologue import make_program, prompt, same, write

BLOCK_BYTES = 2 * 2 * 2 * 16 * 8 * 8
"""Of the tiny llama in fp64: layers, K and V, heads, block size, head size, bytes."""
POOLINGS = {"first": (0, 20), "last": (20, 0), "mean": (9, 12), "none": (0, 3)}
"""Programs with a classifier, by pooling, with their prologues."""


def programs(base: Path, directory: Path) -> dict[str, ProgramRef]:
    """The base, edits alone, edits with a prologue, and classifiers of every pooling behind prologues."""
    spec = load_base_for_lowering(base, "float64").spec
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    refs = {"base": BASE, "edited": write(make_program(spec, 9, 12, edited=True), "edited", directory)}
    plain = Program()
    for site in spec.sites:
        if site.kind == "linear":
            plain.add(site.name, LinearEdit(down=noise(2, site.in_features) / 8, up=noise(2, site.out_features) / 8))
    refs["plain"] = write(plain, "plain", directory)
    for pooling, lengths in POOLINGS.items():
        program = make_program(spec, *lengths)
        program.head = TaskHead(pooling, [HeadLayer(noise(3, spec.hidden_size) / 4)])  # type: ignore[arg-type]
        refs[pooling] = write(program, pooling, directory)
    return refs


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def refs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ProgramRef]:
    return programs(model, tmp_path_factory.mktemp("programs"))


def drain(engine: Engine, ended: Counter[str], steps: int | None = None) -> None:
    """Step to the end, or a few steps, counting the ends of requests."""
    while engine.has_unfinished and steps != 0:
        outputs: list[RequestOutput] = engine.step()
        ended.update(output.request_id for output in outputs if output.finish_reason)
        assert not any(output.error for output in outputs)
        steps = None if steps is None else steps - 1
        if not engine.has_runnable:
            time.sleep(0.001)


def is_idle(engine: Engine) -> bool:
    engine.blocks.check_integrity()
    stats = engine.stats()
    return not (stats.kv_blocks_used or stats.slots_pinned or stats.running or stats.waiting or stats.waiting_for_adapter)


def build(kind: str, request_id: str, length: int, refs: dict[str, ProgramRef], tenant: str) -> Request:
    """A request of a program's kind; programs with a classifier are asked for it, the base for a vector, too."""
    ids = prompt(length, 1 + length % 3)
    if kind == "vector":
        return replace(ask(request_id, ids, task=Task.EMBED), tenant=tenant)
    if kind in POOLINGS:
        return replace(ask(request_id, ids, refs[kind]), tenant=tenant)
    return greedy(request_id, ids, refs[kind], tokens=1 + length % 20, tenant=tenant)


KINDS = ("base", "edited", "plain", "vector", *POOLINGS)
ASKED = st.lists(
    st.tuples(
        st.sampled_from(KINDS), st.integers(1, 60), st.sampled_from("ab"), st.integers(1, 3), st.integers(0, 4), st.booleans()
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=25)
@given(asked=ASKED, caching=st.booleans(), budget=st.sampled_from([5, 16, 64]))
def test_all_end_once_and_give_everything_back(
    asked: list[tuple[str, int, str, int, int, bool]], caching: bool, budget: int, model: Path, refs: dict[str, ProgramRef]
) -> None:
    """Several requests of one prompt (``n`` of them), steps in between, and aborts of some of them."""
    engine = make_engine(
        model,
        "float64",
        kv_cache_bytes=10 * BLOCK_BYTES,
        max_batch_tokens=budget,
        max_running=4,
        max_slots=2,
        prefix_caching=caching,
    )
    ended: Counter[str] = Counter()
    accepted = []
    for index, (kind, length, tenant, copies, steps, aborts) in enumerate(asked):
        names = [f"{index}-{kind}-{copy}" for copy in range(copies)]
        for name in names:
            engine.add(build(kind, name, length, refs, tenant))
        accepted += names
        drain(engine, ended, steps)
        if aborts:
            engine.abort(names[0])
    drain(engine, ended)
    assert ended == Counter(accepted)
    assert is_idle(engine)
    engine.close()


def equal(alone: Result, found: Result) -> None:
    if alone.result is None:
        same(alone, found)
    else:
        torch.testing.assert_close(found.rows, alone.rows, atol=1e-9, rtol=0)


@pytest.mark.parametrize("blocks", [7, 60])
def test_programs_with_prologues_and_heads_come_and_go_while_others_run(
    blocks: int, model: Path, refs: dict[str, ProgramRef]
) -> None:
    """A bank of two slots, no host memory, and in one case so little K/V that sequences push each other out."""
    # Two of the base, which wait for no load, grow beyond what the smaller cache holds.
    requests = [greedy(f"long-{index}", prompt(16, index), tokens=50) for index in range(2)]
    requests += [
        build(kind, f"{kind}-{round_}", 23 + 7 * round_, refs, f"t{round_ % 2}") for round_ in range(3) for kind in KINDS
    ]
    roomy = make_engine(model, "float64", prefix_caching=False)
    alone: dict[str, Result] = {}
    for request in requests:
        alone |= run(roomy, [request])
    roomy.close()
    tight = make_engine(
        model, "float64", kv_cache_bytes=blocks * BLOCK_BYTES, max_batch_tokens=24, max_running=6, max_slots=2, host_bytes=1
    )
    found = run(tight, requests, max_steps=50000)
    stats = tight.stats()
    assert stats.counters["evictions"] > 5
    assert (stats.counters["preemptions"] > 0) == (blocks == 7)
    assert is_idle(tight)
    tight.close()
    for name, result in alone.items():
        assert found[name].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        equal(result, found[name])
