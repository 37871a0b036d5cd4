"""Adapters of one request added up equal PEFT's own sum of them; layers left out equal a checkpoint without those layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from server.adapters.compose import Part, compose, drop_layers
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.packed import unpack_program
from server.adapters.program_file import read_program, write_program
from server.engine.types import BASE, ProgramRef
from tests.conftest import TinyModels
from tests.harness import greedy, lower_directory, make_engine, run
from tests.parity.cases import FAMILIES, Case, linears, make_checkpoint
from tests.parity.equality import PROMPTS, check_equals_peft, check_result
from tests.parity.shared import clean_model, lowering_base, serve

FIRST = Case(
    "first", lambda family: LoraConfig(r=4, lora_alpha=6, target_modules=linears(family), fan_in_fan_out=family == "gpt2")
)
SECOND = Case(
    "second",
    lambda family: LoraConfig(
        r=2, lora_alpha=5, target_modules=linears(family)[:1], use_rslora=True, fan_in_fan_out=family == "gpt2"
    ),
)
SCALES = Case("scales", lambda family: IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2"), kept=("ia3_l",))
PRUNED = Case(
    "pruned", lambda family: AdaLoraConfig(target_modules=linears(family), target_r=3, init_r=4, total_step=10), scale=0.6
)


def lowered(case: Case, family: str, base: Base, model: Path, directory: Path, *, seed: int = 9) -> Program:
    """A case's program as its file gives it."""
    ref = lower_directory(make_checkpoint(case, family, model, directory / case.name, seed=seed), base, case.name)
    return unpack_program(read_program(Path(ref.path)), base.spec)


def written(program: Program, directory: Path, name: str) -> ProgramRef:
    write_program(directory / f"{name}.safetensors", program, program_id=name, facts={})
    return ProgramRef(name, str(directory / f"{name}.safetensors"))


@pytest.mark.parametrize("family", FAMILIES)
def test_weighted_adapters_equal_peft(family: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    model = tiny_models(family)
    base = lowering_base(model)
    weights = (0.7, 1.5)
    parts = [
        Part(lowered(case, family, base, model, tmp_path, seed=seed), weight)
        for case, weight, seed in zip((FIRST, SECOND), weights, (9, 10), strict=True)
    ]
    composed = written(compose(parts, base), tmp_path, "composed")
    results = serve(model, composed, [greedy(name, prompt, composed) for name, prompt in PROMPTS.items()])
    first = ProgramRef("first", str(tmp_path / "first/program-float32.safetensors"))
    only = serve(model, first, [greedy("first", PROMPTS["long"], first)])
    reference: Any = PeftModel.from_pretrained(clean_model(model), tmp_path / "first", adapter_name="first")
    reference.load_adapter(tmp_path / "second", "second")
    reference.add_weighted_adapter(["first", "second"], list(weights), "sum", combination_type="cat")
    reference.set_adapter("sum")
    for name, prompt in PROMPTS.items():
        check_result(results[name], reference.eval(), prompt, name)
    assert float((results["long"].logits[0] - only["first"].logits[0]).abs().max()) > 1e-2, "the second adapter changes nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_left_out_layers_equal_a_checkpoint_without_them(family: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    model = tiny_models(family)
    base = lowering_base(model)
    program = lowered(FIRST, family, base, model, tmp_path)
    ref = written(drop_layers(program, base.spec, 1), tmp_path, "dropped")
    weights = tmp_path / "first" / "adapter_model.safetensors"
    tensors = load_file(weights)
    kept = {name: tensor if ".1." in name else torch.zeros_like(tensor) for name, tensor in tensors.items()}
    assert sum(".1." in name for name in tensors) == len(tensors) / 2
    save_file(kept, weights)
    check_equals_peft(model, tmp_path / "first", ref)


def test_all_layers_left_out_are_the_base(tiny_models: TinyModels, tmp_path: Path) -> None:
    model = tiny_models("llama")
    base = lowering_base(model)
    nothing = written(drop_layers(lowered(FIRST, "llama", base, model, tmp_path), base.spec, 2), tmp_path, "nothing")
    engine = make_engine(model)
    results = run(engine, [greedy("base", PROMPTS["long"], BASE), greedy("nothing", PROMPTS["long"], nothing)])
    engine.close()
    torch.testing.assert_close(torch.stack(results["base"].logits), torch.stack(results["nothing"].logits), rtol=1e-5, atol=1e-5)


def test_a_composition_of_methods_packed_with_its_parts_equals_alone(tiny_models: TinyModels, tmp_path: Path) -> None:
    """In fp64, where rounding hides nothing."""
    model = tiny_models("llama")
    base = lowering_base(model, "float64")
    programs = {case.name: lowered(case, "llama", base, model, tmp_path) for case in (FIRST, SCALES, PRUNED)}
    weights = {"first": 0.5, "scales": 1.0, "pruned": -0.3}
    programs["composed"] = compose([Part(programs[name], weight) for name, weight in weights.items()], base)
    refs = {name: written(program, tmp_path, name) for name, program in programs.items()}
    requests = [
        greedy(f"{name}-{kind}", prompt, ref) for name, ref in {**refs, "base": BASE}.items() for kind, prompt in PROMPTS.items()
    ]
    engine = make_engine(model, "float64", prefix_caching=False)
    alone = {request.request_id: run(engine, [request])[request.request_id] for request in requests}
    packed = run(engine, requests)
    engine.close()
    for name, result in packed.items():
        assert result.tokens == alone[name].tokens
        assert float((torch.stack(result.logits) - torch.stack(alone[name].logits)).abs().max()) <= 1e-10
    assert len({tuple(packed[f"{name}-long"].tokens) for name in (*refs, "base")}) == 5, "a program changes nothing"
