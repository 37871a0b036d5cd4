"""AdapterHub's checkpoints, served by the engine, equal the library: every position's logits and the greedy tokens, all packed in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from server.adapters.faults import LoweringError
from server.adapters.lower import lower
from server.engine.types import ProgramRef
from tests.harness import Result, greedy, load_base_for_lowering, make_engine, run
from tests.parity.golden import GOLDEN, Expected, base_directory, expected, lower_golden, names, read_golden

TOLERANCE = 1e-4
DECODERS = ("llama", "gpt2", "qwen2")
PROLOGUES = ("prefix", "mam", "prompt")
NEEDS_PROLOGUE = tuple(name for family in DECODERS for name in names("cases", family) if name.split("-")[1].startswith(PROLOGUES))
"""Golden cases that wait for prologues in the engine."""
NEEDS_ENCODER = tuple(names("cases", "bert"))
"""Golden cases that wait for encoders."""
CASES = tuple(name for family in DECODERS for name in names("cases", family) if name not in NEEDS_PROLOGUE)


def serve(family: str, programs: dict[str, ProgramRef], known: dict[str, list[Expected]]) -> dict[str, Result]:
    """All programs of a family in one engine at once. A prompt's every prefix is a request of its own, for the logits at its last token."""
    engine = make_engine(base_directory(family), max_batch_tokens=96)
    requests = []
    for name, program in programs.items():
        for index, item in enumerate(known[name]):
            requests.append(greedy(f"{name}/{index}/all", item.prompt, program, tokens=len(item.greedy)))
            for length in range(1, len(item.prompt)):
                requests.append(greedy(f"{name}/{index}/{length}", item.prompt[:length], program, tokens=1))
    results = run(engine, requests, max_steps=5000)
    engine.close()
    return results


def check(name: str, known: Sequence[Expected], results: dict[str, Result]) -> None:
    for index, item in enumerate(known):
        last = results[f"{name}/{index}/all"]
        assert last.error is None
        prefixes = [results[f"{name}/{index}/{length}"].logits[0] for length in range(1, len(item.prompt))]
        found = torch.stack([*prefixes, *last.logits])
        wanted = item.logits[: len(found)]
        difference = float(((found - wanted).abs() / wanted.abs().clamp(min=1.0)).max())
        assert difference <= TOLERANCE, f"{name}, prompt {index}: {difference}"
        assert last.tokens == item.greedy


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Result]]:
    """Every case's results, family by family; served together, so that each has the others for neighbours."""
    found = {}
    for family in DECODERS:
        base = load_base_for_lowering(base_directory(family))
        cases = [name for name in CASES if name.startswith(family)]
        target = tmp_path_factory.mktemp(family)
        programs = {name: lower_golden(GOLDEN / "cases" / name, base, target) for name in cases}
        found[family] = serve(family, programs, {name: expected(GOLDEN / "cases" / name) for name in cases})
    return found


@pytest.mark.parametrize("name", CASES)
def test_equals_the_library(name: str, served: dict[str, dict[str, Result]]) -> None:
    check(name, expected(GOLDEN / "cases" / name), served[name.split("-")[0]])


@pytest.mark.parametrize("name", CASES)
def test_the_effect_is_not_nothing(name: str) -> None:
    family = name.split("-")[0]
    known = expected(GOLDEN / "cases" / name)
    plain = serve(family, {name: ProgramRef("", "")}, {name: known})
    with pytest.raises(AssertionError):
        check(name, known, plain)


@pytest.mark.parametrize("name", names("refused"))
def test_refused_with_the_reason(name: str) -> None:
    base = load_base_for_lowering(base_directory(name.split("-")[0]))
    with pytest.raises(LoweringError) as caught:
        lower(read_golden(GOLDEN / "refused" / name), base)
    assert {fault.code for fault in caught.value.faults} == {"unsupported_field"}
