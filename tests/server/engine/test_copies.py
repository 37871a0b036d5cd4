"""Where copies to the device run beside the steps: a request waits for its own, nobody else does, and whatever happens meanwhile spoils nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.adapters.pending_copies import PendingCopies
from server.engine.engine import Engine
from server.engine.types import BASE, FinishReason, ProgramRef, Task
from tests.conftest import TinyModels
from tests.harness import ask, greedy, make_encoder, make_engine, run
from tests.held_copies import HeldCopies
from tests.server.engine.stepping import Make, finish, settle, states, wait_for_loads
from tests.server.engine.test_tasks import make_probe

PROMPT = [9, 200, 31, 77]
TOKENS = 6


class Held:
    """An engine whose copies end when the test says so, and the tokens that it gave."""

    def __init__(self, model: Path, **sizes: int) -> None:
        self.engine = make_engine(model, **sizes)
        self.copies = HeldCopies()
        self.engine.bank._pending = PendingCopies(self.copies)
        self.tokens: dict[str, list[int]] = {}
        step = self.engine.step

        def recorded() -> list[object]:
            outputs = step()
            for output in outputs:
                assert output.error is None
                self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            return list(outputs)

        self.engine.step = recorded  # type: ignore[method-assign,assignment]

    @property
    def memory(self) -> tuple[int, int, int]:
        """Bytes and slots on the device, and bytes in the host."""
        return self.engine.bank.used_bytes, self.engine.bank.num_slots_used, self.engine.host.used_bytes

    def load(self) -> None:
        """Until what is asked for is on its way to the device."""
        before = self.copies.count
        while self.copies.count == before:
            wait_for_loads(self.engine)
            self.engine.step()


@pytest.fixture(scope="module")
def refs(make: Make) -> list[ProgramRef]:
    return [make(f"copied-{index}", 2) for index in range(2)]


@pytest.fixture(scope="module")
def alone(model: Path, refs: list[ProgramRef]) -> list[list[int]]:
    """What each program says of the prompt, and the base."""
    engine: Engine = make_engine(model)
    found = [run(engine, [greedy("x", PROMPT, ref, tokens=TOKENS)])["x"].tokens for ref in (*refs, BASE)]
    assert found[0] != found[1] != found[2] != found[0], "the programs change nothing"
    return found


def test_others_go_on_while_a_program_is_copied(model: Path, refs: list[ProgramRef], alone: list[list[int]]) -> None:
    held = Held(model)
    engine = held.engine
    engine.add(greedy("waits", PROMPT, refs[0], tokens=TOKENS))
    held.load()
    assert states(engine.take_events(), "copied-0") == ["loading", "host", "resident"]
    engine.add(greedy("others", PROMPT, tokens=TOKENS))
    for _ in range(TOKENS):
        engine.step()
    assert held.tokens == {"others": alone[2]}
    held.copies.finish()
    assert set(finish(engine)) == {"waits"}
    assert held.tokens["waits"] == alone[0]
    assert engine.stats().counters["admissions"] == 1


def test_an_engine_looks_again_while_all_wait_for_a_copy(model: Path, refs: list[ProgramRef], alone: list[list[int]]) -> None:
    held = Held(model)
    held.engine.add(greedy("x", PROMPT, refs[0], tokens=TOKENS))
    held.load()
    for _ in range(3):
        held.engine.step()
        assert held.engine.has_runnable
    held.copies.finish()
    finish(held.engine)
    assert held.tokens == {"x": alone[0]}
    held.engine.step()
    assert not held.engine.has_runnable


def test_a_program_that_is_dropped_while_it_is_copied_is_gone(
    model: Path, refs: list[ProgramRef], alone: list[list[int]]
) -> None:
    """Asked for by a request, or ahead. Its range is the next one's at once, and what is copied late does not harm that."""
    held = Held(model)
    engine = held.engine
    engine.add(greedy("gone", PROMPT, refs[0], tokens=TOKENS))
    held.load()
    engine.drop_program("copied-0")
    assert states(engine.take_events(), "copied-0") == ["loading", "host", "resident", "draining"]
    engine.abort("gone")
    assert held.memory == (0, 0, 0)
    engine.load_program(refs[0])
    held.load()
    engine.drop_program("copied-0")
    assert held.memory == (0, 0, 0)
    assert states(engine.take_events(), "copied-0") == ["stored dropped", "loading", "host", "resident", "stored dropped"]
    engine.add(greedy("next", PROMPT, refs[1], tokens=TOKENS))
    held.load()
    held.copies.finish()
    finish(engine)
    assert held.tokens == {"gone": [], "next": alone[1]}


def test_two_programs_with_room_for_one_are_both_served(model: Path, refs: list[ProgramRef], alone: list[list[int]]) -> None:
    """Each request of either tenant finds the other's program there, and copies take some steps."""
    held = Held(model, max_slots=1)
    for index in range(8):
        held.engine.add(greedy(str(index), PROMPT, refs[index % 2], tokens=TOKENS, tenant="ab"[index % 2]))
    steps = 0

    def tick() -> None:
        nonlocal steps
        steps += 1
        wait_for_loads(held.engine)
        assert steps < 400, "they push each other out"
        if steps % 3 == 0:
            held.copies.finish()

    assert {output.finish_reason for output in finish(held.engine, tick).values()} == {FinishReason.LENGTH}
    assert held.tokens == {str(index): alone[index % 2] for index in range(8)}


def test_pins_and_prefetches_while_they_are_copied(
    model: Path, make: Make, refs: list[ProgramRef], alone: list[list[int]]
) -> None:
    """Two slots: a program that is pinned, one that is asked for ahead, and a third that finds no room before both could be used."""
    held, third = Held(model, max_slots=2), make("copied-2", 2)
    engine = held.engine
    engine.pin_program(refs[0])
    held.load()
    engine.load_program(refs[1])
    held.load()
    engine.load_program(third)
    events = settle(engine)
    assert states(events, "copied-2") == ["loading", "host"]
    stats = engine.stats()
    assert (stats.slots_used, stats.bank_bytes_pinned) == (2, stats.bank_bytes_used // 2)
    held.copies.finish()
    settle(engine)
    engine.load_program(third)
    held.load()
    assert engine.bank.find("copied-0") is not None
    assert states(engine.take_events(), "copied-1")[-1] == "host evicted"
    engine.unpin_program("copied-0")
    for index, ref in enumerate(refs):
        engine.add(greedy(str(index), PROMPT, ref, tokens=TOKENS))
    finish(engine, held.copies.finish)
    assert held.tokens == {"0": alone[0], "1": alone[1]}
    engine.pin_program(third)
    engine.drop_program("copied-2")
    held.engine.step()
    engine.close()


def test_an_encoder_waits_for_a_copy(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("bert")
    probe = make_probe(base, tmp_path / "probe", dtype="float32", pooling="mean", multi_label=False)
    engine = make_encoder(base)
    expected = run(engine, [ask("x", PROMPT, probe)])["x"].rows
    engine.close()
    engine, copies = make_encoder(base), HeldCopies()
    engine.bank._pending = PendingCopies(copies)
    engine.add(ask("x", PROMPT, probe))
    while not copies.count:
        engine.step()
    engine.add(ask("others", PROMPT, task=Task.EMBED))
    assert [output.request_id for output in engine.step()] == ["others"]
    assert engine.has_runnable
    copies.finish()
    (output,) = engine.step()
    assert output.result is not None
    torch.testing.assert_close(torch.tensor(output.result.rows, dtype=expected.dtype), expected)
    engine.close()
