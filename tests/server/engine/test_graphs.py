"""Decode steps that are replayed give what steps give that are run: for other programs, other rows and longer sequences than were recorded.

Without a GPU the kernels run in Triton's interpreter, and a recording runs every operation again (``recorded_graph``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from server.adapters.ir import BottleneckEdit, LinearEdit, NormEdit, Placement, Program
from server.adapters.kernels import lowrank_reference
from server.adapters.kernels.triton_slots import TRITON
from server.adapters.program_file import write_program
from server.engine import graphs
from server.engine.engine import Engine
from server.engine.graphs import DecodeGraphs
from server.engine.kernels import choice
from server.engine.types import BASE, ProgramRef, Request
from tests.conftest import TinyModels
from tests.harness import Result, greedy, load_base_for_lowering, make_engine, run
from tests.recorded_graph import RecordedGraph
from tests.tiny import FAMILIES, make_tiny

pytestmark = [
    # The interpreter computes with NumPy, which warns of what is meant here.
    pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="compiled kernels take no CPU tensors; test_on_gpu has their recordings"
    ),
]

Write = Callable[..., ProgramRef]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one layer: the interpreter is slow."""
    return make_tiny("llama", tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def write(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Program files by name, with edits of all linears, the head's aside."""
    spec, directory = load_base_for_lowering(model).spec, tmp_path_factory.mktemp("programs")

    def make(
        name: str,
        rank: int = 3,
        *,
        vectors: bool = False,
        head: bool = False,
        inner: int = 0,
        norms: bool = False,
        pairs: bool = False,
        dense: bool = False,
    ) -> ProgramRef:
        generator = torch.Generator().manual_seed(sum(name.encode()))

        def r(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) / 6

        program = Program()
        for site in spec.sites:
            if (site.kind == "linear" and (rank or vectors or pairs)) or (site.kind == "head" and head):
                edit = LinearEdit(down=r(rank, site.in_features), up=r(rank, site.out_features)) if rank else LinearEdit()
                if vectors:
                    edit.in_scale, edit.out_scale = 1 + r(site.in_features), 1 + r(site.out_features)
                    edit.shift = r(site.out_features)
                if pairs:
                    edit.pair_scale, edit.pair_group = r(site.out_features), 4
                if dense:
                    edit.dense = r(site.out_features, site.in_features)
                program.add(site.name, edit)
            if site.kind == "norm" and norms:
                program.add(site.name, NormEdit(1 + r(site.out_features)))
        for sublayer in spec.sublayers if inner else ():
            width = spec.hidden_size
            program.add(sublayer.site, BottleneckEdit(Placement("gelu"), r(inner, width), r(inner, width), r(inner), r(width)))
        path = directory / f"{name}.safetensors"
        write_program(path, program, program_id=name, facts={})
        return ProgramRef(name, str(path))

    return make


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[RecordedGraph]:
    """Engines record a step of a kind when it first comes; these are the recordings."""
    made: list[RecordedGraph] = []

    def graph() -> RecordedGraph:
        made.append(RecordedGraph())
        return made[-1]

    monkeypatch.setattr(graphs, "AFTER", 0)
    monkeypatch.setattr(choice, "runs_triton", lambda dtype, device: True)
    monkeypatch.setattr(choice, "CudaGraphs", lambda: graph)
    return made


@pytest.fixture
def engine(model: Path, recorded: list[RecordedGraph]) -> Iterator[Engine]:
    engine = make_engine(model, kernel=TRITON)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(model: Path) -> Iterator[Engine]:
    engine = make_engine(model, kernel=lowrank_reference)
    yield engine
    engine.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    return [(seed * 31 + 7 * at) % 250 + 5 for at in range(length)]


def ask(*parts: tuple[ProgramRef, int], tokens: int = 3) -> list[Request]:
    """Requests of programs with prompts of some length."""
    return [greedy(f"{index}", prompt(length, index), program, tokens=tokens) for index, (program, length) in enumerate(parts)]


def same(engine: Engine, reference: Engine, requests: list[Request]) -> None:
    found, expected = run(engine, requests), run(reference, requests)
    for name, result in expected.items():
        assert found[name].tokens == result.tokens
        torch.testing.assert_close(rows(found[name]), rows(result), rtol=1e-4, atol=1e-4)


def bring(engine: Engine, *programs: ProgramRef) -> None:
    """To the device, so that all sequences of a later run begin in one step."""
    run(engine, ask(*((program, 2) for program in programs), tokens=1))


def rows(result: Result) -> torch.Tensor:
    return torch.stack(result.logits)


def decodes(engine: Engine) -> DecodeGraphs:
    found = engine._runner._graphs
    assert found is not None
    return found


def test_a_recording_serves_other_programs_with_the_same_terms(
    engine: Engine, reference: Engine, write: Write, recorded: list[RecordedGraph]
) -> None:
    # 4 is the power of two above both ranks.
    first, second = write("first", 3), write("second", 4)
    bring(engine, first, second)
    same(engine, reference, ask((first, 5)))
    assert [graph.replays for graph in recorded] == [2]
    same(engine, reference, ask((second, 9)))
    assert [graph.replays for graph in recorded] == [4]
    assert decodes(engine).num_recorded == 1
    # The base's steps are plain ones: another recording, without a kernel of edits.
    same(engine, reference, ask((BASE, 4)))
    assert [graph.replays for graph in recorded] == [4, 2]


def test_rows_are_filled_up_and_change_places(
    engine: Engine, reference: Engine, write: Write, recorded: list[RecordedGraph]
) -> None:
    one, two = write("one", vectors=True), write("two", 4, vectors=True)
    bring(engine, one, two)
    # Four rows; then three, filled up in a place where the one that is last now wrote its keys before; then two; then one.
    parts = [(one, 3), (two, 5), (BASE, 2), (BASE, 4)]
    requests = [
        greedy(f"{index}", prompt(4 + 5 * index, index), program, tokens=tokens) for index, (program, tokens) in enumerate(parts)
    ]
    same(engine, reference, requests)
    assert [(kind.rows, graph.replays) for kind, graph in zip(decodes(engine)._recorded, recorded, strict=True)] == [
        (4, 2),
        (2, 1),
        (1, 1),
    ]


def test_programs_of_all_kinds_are_recorded_beside_each_other(
    engine: Engine, reference: Engine, write: Write, recorded: list[RecordedGraph]
) -> None:
    programs = [
        write("bottleneck", 0, inner=5),
        write("head", 2, head=True),
        write("norms", 0, norms=True),
        write("pairs", 0, pairs=True, vectors=True),
    ]
    bring(engine, *programs)
    same(engine, reference, ask(*((program, 4 + index) for index, program in enumerate(programs))))
    assert [graph.replays for graph in recorded] == [2]
    # Others of the same terms together, in other rows.
    others = [
        write("more pairs", 0, pairs=True, vectors=True),
        write("all", 2, head=True, norms=True),
        write("more", 0, inner=6),
        BASE,
    ]
    bring(engine, *others)
    same(engine, reference, ask(*((program, 7 - index) for index, program in enumerate(others))))
    assert [graph.replays for graph in recorded] == [4]


def test_longer_sequences_have_recordings_of_their_own(
    engine: Engine, reference: Engine, recorded: list[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "_FEWEST_BLOCKS", 1)
    # From 15 tokens on: a block more with the second token.
    same(engine, reference, ask((BASE, 15), tokens=4))
    assert [kind.blocks for kind in decodes(engine)._recorded] == [1, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_recorded(family: str, recorded: list[RecordedGraph], tiny_models: TinyModels) -> None:
    results = []
    for kernel in (lowrank_reference, TRITON):
        engine = make_engine(tiny_models(family), kernel=kernel)
        results.append(run(engine, ask((BASE, 5)))["0"])
        engine.close()
    assert [graph.replays for graph in recorded] == [2]
    assert results[0].tokens == results[1].tokens
    torch.testing.assert_close(rows(results[1]), rows(results[0]), rtol=1e-4, atol=1e-4)


def test_a_recording_that_went_must_come_more_often(
    engine: Engine, recorded: list[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "AFTER", 1)
    monkeypatch.setattr(graphs, "MOST", 1)
    one, two = [(BASE, 4)], [(BASE, 4), (BASE, 5)]
    for parts in (one, two, one):
        run(engine, ask(*parts, tokens=4))
    # Of three steps each: two replayed, two replayed, and of the kind that went two are run first.
    assert [graph.replays for graph in recorded] == [2, 2, 1]


def test_what_is_refused_often_is_not_tried_any_more(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(graph: RecordedGraph, compute: Callable[[], None]) -> None:
        asked.append(compute)
        raise ValueError("rows that are not contiguous")

    monkeypatch.setattr(graphs, "MOST_REFUSED", 2)
    monkeypatch.setattr(RecordedGraph, "record", refuse)
    for count in (1, 2, 3, 5):
        found = run(engine, ask(*[(BASE, 4)] * count, tokens=3))
        assert all(len(result.tokens) == 3 for result in found.values())
    assert len(asked) == 2


def test_what_no_kernel_finds_by_slot_is_run_as_usual(
    engine: Engine, reference: Engine, write: Write, recorded: list[RecordedGraph]
) -> None:
    dense, plain = write("dense", dense=True), write("plain")
    bring(engine, dense, plain)
    same(engine, reference, ask((dense, 4), (plain, 4)))
    assert not recorded


def test_a_recording_is_made_once_a_kind_has_come_often(
    engine: Engine, recorded: list[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "AFTER", 2)
    run(engine, ask((BASE, 4), tokens=6))
    # Of five steps the first two are run.
    assert [graph.replays for graph in recorded] == [3]


def test_the_recording_that_was_used_longest_ago_goes(
    engine: Engine, reference: Engine, recorded: list[RecordedGraph], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "MOST", 1)
    for parts in ([(BASE, 4)], [(BASE, 4), (BASE, 5)], [(BASE, 4)]):
        same(engine, reference, ask(*parts, tokens=2))
    assert len(recorded) == 3
    assert decodes(engine).num_recorded == 1


def test_what_a_device_refuses_it_is_not_asked_for_again(
    engine: Engine, reference: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def refuse(graph: RecordedGraph, compute: Callable[[], None]) -> None:
        asked.append(compute)
        compute()
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(RecordedGraph, "record", refuse)
    with caplog.at_level(logging.ERROR):
        same(engine, reference, ask((BASE, 4)))
    assert len(asked) == 1
    assert "cannot be recorded" in caplog.text


def test_what_waits_for_the_device_cannot_be_recorded() -> None:
    value = torch.ones(2)
    for wrong in (lambda: value.sum().item(), lambda: value.nonzero(), lambda: torch.tensor([1.0, 2.0])):
        with pytest.raises(RuntimeError):
            RecordedGraph().record(wrong)  # type: ignore[arg-type]
