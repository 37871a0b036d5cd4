"""REL-14 and REL-15: adapters are loaded, pinned, dropped and asked for again while others run. 500 random interleavings, without a hang."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapter_store.residency import TRANSITIONS
from server.adapters.arena import Arena
from server.adapters.extents import Slide
from server.adapters.ir import LinearEdit, Program
from server.adapters.pending_copies import PendingCopies
from server.adapters.program_file import write_program
from server.engine.engine import Engine
from server.engine.types import BASE, FinishReason, ProgramRef
from tests.conftest import TinyModels
from tests.harness import greedy, load_base_for_lowering, make_engine, run
from tests.held_copies import HeldCopies

PROMPTS = ([9, 200, 31, 77], [5] * 19)
TOKENS = 4
RANKS = {"p0": 1, "p1": 2, "p2": 2, "p3": 3, "p4": 4, "p5": 1, "p6": 3, "p7": 2}
WATCHDOG_S = 60.0
CLEARED_EVERY = 17
"""Rounds; in between programs stay where they are, so that the bank has gaps."""
ROUNDS = 170
"""Of either engine."""


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def refs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ProgramRef]:
    spec, directory = load_base_for_lowering(model, "float64").spec, tmp_path_factory.mktemp("programs")
    found = {"base": BASE}
    for name, rank in RANKS.items():
        generator, program = torch.Generator().manual_seed(rank + len(found)), Program()
        for site in spec.sites:
            if site.kind == "linear":
                down, up = (
                    torch.randn(rank, size, generator=generator).double() / 4 for size in (site.in_features, site.out_features)
                )
                shift = torch.randn(site.out_features, generator=generator).double() / 4
                program.add(site.name, LinearEdit(down=down, up=up, shift=shift))
        found[name] = ProgramRef(name, str(directory / name))
        write_program(directory / name, program, program_id=name, facts={})
    return found


@pytest.fixture(scope="module")
def alone(model: Path, refs: dict[str, ProgramRef]) -> dict[tuple[str, int], list[int]]:
    """Greedy tokens of every program and prompt, each run by itself."""
    engine = make_engine(model, "float64", prefix_caching=False)
    found = {}
    for name, ref in refs.items():
        for index, prompt in enumerate(PROMPTS):
            found[name, index] = run(engine, [greedy("x", prompt, ref, tokens=TOKENS)])["x"].tokens
    engine.close()
    assert len({tuple(tokens) for tokens in found.values()}) > len(PROMPTS), "the programs change nothing"
    return found


class Churn:
    """One engine through many rounds, each of which ends with nothing running, and some with nothing left. ``copies`` end at random."""

    def __init__(
        self,
        engine: Engine,
        refs: dict[str, ProgramRef],
        alone: dict[tuple[str, int], list[int]],
        copies: HeldCopies | None = None,
    ) -> None:
        self.engine = engine
        self.now = 0.0
        self._copies = copies
        self._ends = random.Random(0)
        self._refs = refs
        self._alone = alone
        self._tokens: dict[str, list[int]] = {}
        self._asked: dict[str, tuple[str, int, int]] = {}
        self._ended: dict[str, FinishReason] = {}
        self._states: dict[str, str] = {}

    def round(self, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(rng.randint(3, 10)):
            name = rng.choice(list(RANKS))
            match rng.choice(("add", "add", "add", "step", "step", "abort", "drop", "load", "pin", "unpin", "replace", "wait")):
                case "add":
                    self._add(rng, rng.choice([name, name, name, "base"]))
                case "step":
                    for _ in range(rng.randint(1, 4)):
                        self._step()
                case "abort" if self._asked:
                    self.engine.abort(rng.choice(list(self._asked)))
                case "drop":
                    self.engine.drop_program(name)
                case "load":
                    self.engine.load_program(self._refs[name])
                case "pin":
                    self.engine.pin_program(self._refs[name])
                case "unpin":
                    self.engine.unpin_program(name)
                case "replace":
                    self._add(rng, name)
                    self.engine.drop_program(name)
                    self._add(rng, rng.choice(list(RANKS)))
                case "wait":
                    self.now += 6
        self._end(seed)

    def _add(self, rng: random.Random, name: str) -> None:
        request_id, prompt, tokens = f"r{len(self._asked)}", rng.randrange(2), rng.randint(1, TOKENS)
        self._asked[request_id], self._tokens[request_id] = (name, prompt, tokens), []
        self.engine.add(greedy(request_id, PROMPTS[prompt], self._refs[name], tokens=tokens, tenant=rng.choice("ab")))

    def _step(self) -> None:
        if self._copies is not None:
            self._copies.finish(self._ends.randint(0, 2))
        for output in self.engine.step():
            assert output.request_id not in self._ended, "an output after the end"
            assert output.error is None, output.error
            self._tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                self._ended[output.request_id] = output.finish_reason
        for event in self.engine.take_events():
            before = self._states.pop(event.program_id, "stored")
            assert event.state == before or event.state in TRANSITIONS[before], (before, event)
            if event.state.value != "stored":
                self._states[event.program_id] = event.state.value
        assert self.engine.bank.used_bytes <= self.engine.bank.capacity_bytes

    def _end(self, seed: int) -> None:
        end = time.monotonic() + WATCHDOG_S
        while self.engine.has_unfinished or self.engine.loader.is_waiting:
            self._step()
            assert time.monotonic() < end, f"round {seed} hangs"
            if not self.engine.has_runnable:
                self.now += 3
                time.sleep(0.0005)
        assert self._ended.keys() == self._asked.keys()
        for request_id, (name, prompt, tokens) in self._asked.items():
            expected = self._alone[name, prompt][:tokens]
            if self._ended[request_id] is FinishReason.ABORT:
                expected = expected[: len(self._tokens[request_id])]
            assert self._tokens[request_id] == expected, f"round {seed}: {request_id} of {name}"
        if seed % CLEARED_EVERY == 0:
            self._clear(seed)
        self._asked, self._tokens, self._ended = {}, {}, {}

    def _clear(self, seed: int) -> None:
        """Drop all. Nothing is left then."""
        end = time.monotonic() + WATCHDOG_S
        for name in RANKS:
            self.engine.drop_program(name)
        self._step()
        while any(self.engine.loader.is_loading(name) for name in RANKS):
            assert time.monotonic() < end, f"a load of round {seed} hangs"
            self._step()
            time.sleep(0.0005)
        stats = self.engine.stats()
        left = (stats.bank_bytes_used, stats.bank_bytes_pinned, stats.host_bytes_used, self.engine.host.reserved_bytes)
        assert left == (0, 0, 0, 0), f"round {seed}"
        assert (stats.slots_used, stats.slots_pinned, stats.kv_blocks_used, stats.waiting_for_adapter) == (0, 0, 0, 0)
        assert not self.engine.bank.is_copying
        assert not self._states
        programs, tiers = self.engine._programs, self.engine._programs._tiers
        for held in ("_users", "_waiting", "_pins", "_pins_to_bring", "_pinned_sizes", "_prefetches", "_refused"):
            assert not getattr(programs, held), f"round {seed}: {held}"
        for held in ("_loads", "_blocked", "dropped", "whereabouts"):
            assert not getattr(tiers, held), f"round {seed}: {held}"
        self.engine.blocks.check_integrity()


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[Slide]:
    """The ranges that slid within the bank."""
    slid: list[Slide] = []
    copy_down = Arena._copy_down

    def counted(arena: Arena, slide: Slide) -> None:
        slid.append(slide)
        copy_down(arena, slide)

    monkeypatch.setattr(Arena, "_copy_down", counted)
    return slid


@pytest.fixture(params=["few slots", "small host", "pieces", "pieces, copied beside steps"])
def churn(
    request: pytest.FixtureRequest, model: Path, refs: dict[str, ProgramRef], alone: dict[tuple[str, int], list[int]]
) -> Iterator[Churn]:
    """Fewer slots than programs; or a host tier of one program, and a bank of the two largest, so that one fits beside any pins; or a bank
    that most of them fit into, though rarely without being pushed together, and the same where copies run beside the steps."""
    clock: list[Churn] = []
    file_bytes = {name: Path(ref.path).stat().st_size for name, ref in refs.items() if name != "base"}
    sizes = {
        "few slots": {"max_slots": 2, "host_bytes": 3 * file_bytes["p3"]},
        "small host": {"bank_bytes": 2 * file_bytes["p4"], "host_bytes": 1},
        "pieces": {"bank_bytes": sum(file_bytes.values()) * 5 // 10},
    }[request.param.partition(",")[0]]
    engine = make_engine(model, "float64", max_running=3, clock=lambda: clock[0].now if clock else 0.0, **sizes)
    copies = HeldCopies() if "beside" in request.param else None
    if copies is not None:
        engine.bank._pending = PendingCopies(copies)
    clock.append(Churn(engine, refs, alone, copies))
    yield clock[0]
    engine.close()


def test_interleavings(churn: Churn, moves: list[Slide], request: pytest.FixtureRequest) -> None:
    for seed in range(ROUNDS):
        churn.round(seed)
    counters = churn.engine.stats().counters
    assert min(counters[name] for name in ("evictions", "drops", "admissions", "loads")) > 10
    if "pieces" in request.node.name:
        assert len(moves) > 4
    else:
        assert counters["host_evictions"] > 10
