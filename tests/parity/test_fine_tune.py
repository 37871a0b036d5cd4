"""Medley's own formats: biases and fine-tuned checkpoints, against the fine-tuned model itself in transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.adapters.faults import LoweringError
from server.adapters.ir import EmbedEdit, HeadEdit, LinearEdit, Program
from server.adapters.lower import Checkpoint, lower
from server.adapters.program_file import read_program
from tests.conftest import TinyModels
from tests.harness import lower_directory
from tests.parity.cases import FAMILIES
from tests.parity.equality import check_equals
from tests.parity.shared import clean_model, lowering_base, unchanged_model

RANK = 4


def tune(base: Path, chosen: Callable[[str], bool], *, scale: float = 0.1, seed: int = 3) -> Any:
    """The base with noise on the parameters that are chosen by name."""
    model = clean_model(base)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if chosen(name):
            parameter.data += torch.randn(parameter.shape, generator=generator) * scale
    return model


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    return directory


def saved(model: Any, directory: Path) -> dict[str, Tensor]:
    """The whole checkpoint as transformers writes it."""
    model.save_pretrained(directory / "whole")
    return load_file(directory / "whole" / "model.safetensors")


def serve(base: Path, adapter: Path, reference: Any, name: str) -> dict[str, Any]:
    """Check the adapter against the reference, and give the program's facts."""
    program = lower_directory(adapter, lowering_base(base), name)
    check_equals(base, program, reference)
    return read_program(Path(program.path)).facts


def is_block(name: str) -> bool:
    """Parameters of layers, but not learned positions, the embedding or the head."""
    return ".layers." in name or ".h." in name


@pytest.mark.parametrize("values", ["delta", "replaced"])
@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_biases(values: str, family: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models(family)
    original = unchanged_model(base).state_dict()
    model = tune(base, lambda name: name.endswith(".bias"), scale=0.3)
    tensors = {
        name: tensor - original[name] if values == "delta" else tensor
        for name, tensor in model.state_dict().items()
        if name.endswith(".bias")
    }
    adapter = write(tmp_path, {"medley_type": "BITFIT", "values": values}, tensors)
    serve(base, adapter, model, f"bitfit-{family}-{values}")


def test_bias_deltas_where_the_base_has_no_bias(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    name = "model.layers.1.mlp.down_proj"
    delta = torch.randn(32, generator=torch.Generator().manual_seed(0))
    model = clean_model(base)
    model.get_submodule(name).bias = torch.nn.Parameter(delta)
    serve(base, write(tmp_path, {"medley_type": "BITFIT"}, {f"{name}.bias": delta}), model, "bitfit-llama")


@pytest.mark.parametrize(
    ("tensors", "settings", "codes"),
    [
        ({"model.layers.0.mlp.up_proj.bias": 48}, {"values": "replaced"}, {"unmatched_tensor"}),
        ({"model.layers.0.input_layernorm.bias": 32}, {}, {"unmatched_tensor"}),
        ({"model.layers.0.mlp.up_proj.bias": 47}, {}, {"wrong_shape"}),
        ({"model.embed_tokens.bias": 32}, {}, {"unused_tensor"}),
        ({"model.layers.0.mlp.up_proj.weight": 48}, {}, {"unused_tensor"}),
        ({"model.layers.0.mlp.up_proj.bias": 48}, {"values": "ratio"}, {"unsupported_field"}),
    ],
)
def test_faults_of_biases(tensors: dict[str, int], settings: dict[str, Any], codes: set[str], tiny_models: TinyModels) -> None:
    checkpoint = Checkpoint({"medley_type": "BITFIT", **settings}, {name: torch.ones(size) for name, size in tensors.items()})
    with pytest.raises(LoweringError) as caught:
        lower(checkpoint, lowering_base(tiny_models("llama")))
    assert {fault.code for fault in caught.value.faults} == codes


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_checkpoint_is_exact(family: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models(family)
    model = tune(base, lambda name: "wpe" not in name, scale=0.05)
    serve(base, write(tmp_path, {"medley_type": "FINE_TUNE"}, saved(model, tmp_path)), model, f"whole-{family}")


@pytest.mark.parametrize("family", FAMILIES)
def test_last_layer_and_a_few_rows(family: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models(family)
    model = tune(base, lambda name: ".1." in name)
    embedding = model.get_input_embeddings().weight
    embedding.data[[5, 9, 200]] += 0.3
    tensors = {
        name: tensor for name, tensor in saved(model, tmp_path).items() if ".1." in name or "embed" in name or "wte" in name
    }
    serve(base, write(tmp_path, {"medley_type": "FINE_TUNE", "rank": None}, tensors), model, f"partial-{family}")
    program = program_of(base, tmp_path)
    assert all(".0." not in site for site in program.edits)
    embeds = [edit for edits in program.edits.values() for edit in edits if isinstance(edit, EmbedEdit)]
    assert [edit.row_ids.tolist() for edit in embeds if edit.row_ids is not None] == [[5, 9, 200]]


@pytest.mark.parametrize("family", FAMILIES)
def test_rank_gives_the_best_approximation_and_its_error(family: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models(family)
    original = unchanged_model(base).state_dict()
    model = tune(base, lambda name: "wpe" not in name, scale=0.05)
    tensors = saved(model, tmp_path)
    total, lost = 0.0, 0.0
    for name, parameter in model.named_parameters():
        delta = parameter.data - original[name]
        total += float(delta.double().square().sum())
        if parameter.ndim == 2 and "wpe" not in name:
            left, values, right = torch.linalg.svd(delta, full_matrices=False)
            parameter.data = original[name] + (left[:, :RANK] * values[:RANK]) @ right[:RANK]
            lost += float(values[RANK:].double().square().sum())
    facts = serve(base, write(tmp_path, {"medley_type": "FINE_TUNE", "rank": RANK}, tensors), model, f"rank-{family}")
    assert facts["notes"]["rank"] == RANK
    assert facts["notes"]["relative_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_high_rank_is_exact_where_that_is_smaller(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("llama")
    model = tune(base, is_block)
    write(tmp_path, {"medley_type": "FINE_TUNE", "rank": 30}, saved(model, tmp_path))
    program = program_of(base, tmp_path)
    assert program.notes == {"rank": 30, "relative_error": 0}
    assert all(edit.down is None for edits in program.edits.values() for edit in edits if isinstance(edit, LinearEdit))


def test_a_head_of_its_own_beside_a_tied_base(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("qwen2")
    model = clean_model(base)
    head = torch.nn.Parameter(model.lm_head.weight.data + 0.1)
    model.lm_head.weight = head
    tensors = {"lm_head.weight": head.data, "model.embed_tokens.weight": model.model.embed_tokens.weight.data}
    serve(base, write(tmp_path, {"medley_type": "FINE_TUNE"}, tensors), model, "untied")
    assert [type(edit) for edits in program_of(base, tmp_path).edits.values() for edit in edits] == [HeadEdit]


@pytest.mark.parametrize(
    ("tensors", "settings", "code"),
    [
        ({"transformer.wpe.weight": torch.ones(512, 32)}, {}, "unmatched_tensor"),
        ({"transformer.h.0.nothing.weight": torch.ones(2)}, {}, "unmatched_tensor"),
        ({"transformer.wte.weight": torch.ones(300, 32)}, {}, "wrong_shape"),
        ({"transformer.h.0.mlp.c_fc.weight": torch.full((32, 128), 3e38)}, {"rank": 2}, "non_finite"),
        ({"transformer.h.0.ln_1.weight": torch.ones(32)}, {"rank": 0}, "unsupported_field"),
        ({"transformer.h.0.ln_1.weight": torch.ones(32)}, {"rank": "8"}, "unsupported_field"),
        ({"transformer.h.0.mlp.c_fc.extra": torch.ones(32)}, {}, "unused_tensor"),
        ({}, {"rank": 4}, "empty_adapter"),
    ],
)
def test_faults(tensors: dict[str, Tensor], settings: dict[str, Any], code: str, tiny_models: TinyModels) -> None:
    with pytest.raises(LoweringError) as caught:
        lower(Checkpoint({"medley_type": "FINE_TUNE", **settings}, tensors), lowering_base(tiny_models("gpt2")))
    assert {fault.code for fault in caught.value.faults} == {code}


def test_what_equals_the_base_is_no_adapter_and_size_is_bounded(tiny_models: TinyModels, tmp_path: Path) -> None:
    base = tiny_models("gpt2")
    config = {"medley_type": "FINE_TUNE"}
    same = saved(unchanged_model(base), tmp_path)
    with pytest.raises(LoweringError, match="changes no module"):
        lower(Checkpoint(config, same), lowering_base(base))
    tuned = tune(base, is_block).state_dict()
    with pytest.raises(LoweringError, match="too large"):
        lower(Checkpoint(config, {name: tuned[name] for name in same}), lowering_base(base), max_bytes=10_000)


def program_of(base: Path, adapter: Path) -> Program:
    """The lowered checkpoint of a directory."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    return lower(Checkpoint(config, load_file(adapter / "adapter_model.safetensors")), lowering_base(base))
