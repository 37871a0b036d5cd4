"""AdapterHub directories over real HTTP: pushed as the library saved them, and a fusion that outlives the adapters it was made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from medley_client import ApiError
from server.adapters.lower import lower
from tests.conftest import TinyModels
from tests.harness import greedy, load_base_for_lowering, make_engine, run
from tests.live import Live, Sharing
from tests.parity.golden import GOLDEN, read_golden, write
from tests.tiny import tiny_tokenizer

# The tiny Llama has the golden base's shapes, and other weights.
FUSION = GOLDEN / "cases" / "llama-fusion"
CHILDREN = ("child_a", "child_b")
PROMPT = "Fuse them"


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def live(sharing: Sharing) -> Live:
    return sharing()


def expected_tokens(model: Path, directory: Path, target: Path) -> list[int]:
    """What the engine alone makes of the prompt, in this process."""
    program = write(lower(read_golden(directory), load_base_for_lowering(model)), directory.name, target)
    engine = make_engine(model)
    made = run(engine, [greedy("x", tiny_tokenizer()(PROMPT)["input_ids"], program)])["x"].tokens
    engine.close()
    return made


def generated(live: Live, adapter: str) -> list[int]:
    with live.client() as client:
        made = client.generate(PROMPT, adapter=adapter, max_new_tokens=8, ignore_eos_token=True)
    return [token.id for token in made.tokens]


@pytest.mark.parametrize("case", ["double_seq_bn", "lora", "mam"])
def test_directories_are_served_as_they_are(case: str, live: Live, model: Path, tmp_path: Path) -> None:
    directory = GOLDEN / "cases" / f"llama-{case}"
    with live.client() as client:
        pushed = client.adapters.push(directory, case.replace("_", "-"))
    assert pushed.facts["library"] == "adapters"
    assert generated(live, pushed.name) == expected_tokens(model, directory, tmp_path)


def test_a_fusion_outlives_its_children(live: Live, model: Path, tmp_path: Path) -> None:
    with live.client() as client, live.client("globex") as other:
        other.adapters.push(FUSION / "children" / "child_a", "child_a")
        with pytest.raises(ApiError) as caught:
            client.adapters.push(FUSION, "fused")
        assert [(fault.code, fault.found) for fault in caught.value.faults] == [("missing_child", name) for name in CHILDREN]
        for name in CHILDREN:
            client.adapters.push(FUSION / "children" / name, name)
        fused = client.adapters.push(FUSION, "fused")
        assert fused.facts["method"] == "fusion"
        wanted = expected_tokens(model, FUSION, tmp_path)
        assert generated(live, "fused") == wanted
        for name in CHILDREN:
            client.adapters.delete(name)
        assert generated(live, "fused") == wanted
        assert generated(live, "fused") != generated(live, "base")
