"""AdapterHub's checkpoints, served by the engine, equal the library: every position's logits and the greedy tokens, all packed in one batch."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from server.adapters.faults import LoweringError
from server.adapters.ir import HeadLayer, TaskHead
from server.adapters.lower import lower
from server.engine.types import BASE, ProgramRef
from tests.harness import Result, ask, greedy, load_base_for_lowering, make_encoder, make_engine, run
from tests.parity.golden import GOLDEN, base_directory, expected, names, read_golden, write

TOLERANCE = 1e-4
DECODERS = ("llama", "gpt2", "qwen2")
CASES = tuple(name for family in DECODERS for name in names("cases", family))
ENCODER_CASES = tuple(names("cases", "bert"))

Served = Mapping[str, Mapping[str, Result]]


def serve(programs: Mapping[str, ProgramRef], family: str) -> dict[str, Result]:
    """All cases in one engine at once. A prompt's every prefix is a request of its own, for the logits at its last token."""
    engine = make_engine(base_directory(family), max_batch_tokens=96)
    requests = []
    for name, program in programs.items():
        for index, item in enumerate(expected(name)):
            requests.append(greedy(f"{name}/{index}/all", item.prompt, program, tokens=len(item.greedy)))
            for length in range(1, len(item.prompt)):
                requests.append(greedy(f"{name}/{index}/{length}", item.prompt[:length], program, tokens=1))
    results = run(engine, requests, max_steps=5000)
    engine.close()
    return results


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """Every decoder case's results by family; served together, so that each has the others for neighbours."""
    found = {}
    for family in DECODERS:
        base, target = load_base_for_lowering(base_directory(family)), tmp_path_factory.mktemp(family)
        cases = [name for name in CASES if name.startswith(family)]
        programs = {name: write(lower(read_golden(GOLDEN / "cases" / name), base), name, target) for name in cases}
        found[family] = serve(programs, family)
    return found


@pytest.fixture(scope="module")
def unchanged() -> Served:
    """The base's results for the prompts of a family's first case, which are those of all cases."""
    return {family: serve({names("cases", family)[0]: BASE}, family) for family in DECODERS}


def logits_of(results: Mapping[str, Result], name: str, index: int, length: int) -> Tensor:
    """``(n, vocab)`` at every position of a prompt, and at those of the tokens that follow but the last."""
    last = results[f"{name}/{index}/all"]
    assert last.error is None
    return torch.stack([*(results[f"{name}/{index}/{end}"].logits[0] for end in range(1, length)), *last.logits])


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest one, relative where values are above 1."""
    assert found.shape == wanted.shape
    return float(((found - wanted).abs() / wanted.abs().clamp(min=1.0)).max())


@pytest.mark.parametrize("name", CASES)
def test_decoders_equal_the_library(name: str, served: Served, unchanged: Served) -> None:
    family = name.split("-")[0]
    effect = 0.0
    for index, item in enumerate(expected(name)):
        assert item.logits is not None
        found = logits_of(served[family], name, index, len(item.prompt))
        assert difference(found, item.logits[:-1]) <= TOLERANCE
        assert served[family][f"{name}/{index}/all"].tokens == item.greedy
        plain = logits_of(unchanged[family], names("cases", family)[0], index, len(item.prompt))
        effect = max(effect, difference(found[: len(item.prompt)], plain[: len(item.prompt)]))
    assert effect > 1e-2, "the adapter changes nothing, so that this test would prove nothing"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Result]:
    """Every encoder case's hidden states (through a head that gives them as they are) and scores, all in one engine."""
    base, target = load_base_for_lowering(base_directory("bert")), tmp_path_factory.mktemp("bert")
    engine = make_encoder(base_directory("bert"))
    as_it_is = TaskHead("none", [HeadLayer(torch.eye(base.spec.hidden_size))])
    requests = []
    for name in ENCODER_CASES:
        program = lower(read_golden(GOLDEN / "cases" / name), base)
        head, program.head = program.head, as_it_is
        refs = {"hidden": write(program, f"{name}/hidden", target)}
        if head is not None:
            program.head = head
            refs["scores"] = write(program, f"{name}/scores", target)
        for kind, ref in refs.items():
            requests += [ask(f"{name}/{kind}/{index}", item.prompt, ref) for index, item in enumerate(expected(name))]
    results = run(engine, requests)
    engine.close()
    return results


@pytest.mark.parametrize("name", ENCODER_CASES)
def test_encoders_equal_the_library(name: str, encoded: Mapping[str, Result]) -> None:
    for index, item in enumerate(expected(name)):
        assert item.hidden is not None
        wanted = item.hidden.double()
        # Virtual tokens, behind the first token or in front of it, are no rows of the answer.
        num_virtual, first = len(wanted) - len(item.prompt), int(name.endswith("after_bos"))
        wanted = torch.cat([wanted[:first], wanted[first + num_virtual :]])
        assert difference(encoded[f"{name}/hidden/{index}"].rows, wanted) <= TOLERANCE
        if item.scores is not None:
            rows = encoded[f"{name}/scores/{index}"].rows
            assert difference(rows, item.scores.double().view(rows.shape)) <= TOLERANCE


def test_labels_come_from_the_head(encoded: Mapping[str, Result]) -> None:
    results = {name: encoded[f"bert-{name}/scores/0"].result for name in ("classifier", "tagger", "classifier_many")}
    assert all(result is not None for result in results.values())
    labels = {name: (result.labels, result.multi_label, result.per_token) for name, result in results.items() if result}
    assert labels["classifier"] == (("no", "maybe", "yes"), False, False)
    assert labels["tagger"] == (("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3"), False, True)
    assert labels["classifier_many"][1:] == (True, False)


@pytest.mark.parametrize("name", names("refused"))
def test_refused_with_the_reason(name: str) -> None:
    base = load_base_for_lowering(base_directory(name.split("-")[0]))
    with pytest.raises(LoweringError) as caught:
        lower(read_golden(GOLDEN / "refused" / name), base)
    assert {fault.code for fault in caught.value.faults} == {"unsupported_field"}
