"""Preparing bases: the default's conversion, what is refused and why, and the digest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.engine import base_dir
from server.engine.base_dir import ENCODERS, FAMILIES, UnsupportedBase, check_config, prepare_base
from tests.conftest import TinyModels
from tests.tiny import ENCODERS as TINY_ENCODERS
from tests.tiny import FAMILIES as TINY


def changed(source: Path, directory: Path, **fields: Any) -> Path:
    directory.mkdir()
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("family", [*TINY, *TINY_ENCODERS])
def test_every_family_of_the_list_is_accepted(family: str, tiny_models: TinyModels) -> None:
    assert check_config(tiny_models(family)) == family
    assert set(TINY) == set(FAMILIES)
    assert set(TINY_ENCODERS) == set(ENCODERS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "bloom"}, "not on the tested list"),
        ({"auto_map": {"AutoConfig": "code.Config"}}, "custom code"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not served"),
        ({"rope_scaling": {"type": "longrope"}}, "'longrope' is not served"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "'longrope' is not served"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_refusals_say_why(fields: dict[str, Any], message: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    canary = changed(tiny_models("llama"), tmp_path / "model", **fields)
    (canary / "code.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    with pytest.raises(UnsupportedBase, match=message):
        prepare_base(str(canary), tmp_path / "cache")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "relative position"),
        ({"is_decoder": True}, "configured as a decoder"),
        ({"add_cross_attention": True}, "configured as a decoder"),
        ({"chunk_size_feed_forward": 4}, "chunk_size_feed_forward"),
    ],
)
def test_encoders_that_are_refused(fields: dict[str, Any], message: str, tiny_models: TinyModels, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedBase, match=message):
        check_config(changed(tiny_models("bert"), tmp_path / "model", **fields))


def test_pickled_weights_are_refused(tiny_models: TinyModels, tmp_path: Path) -> None:
    model = changed(tiny_models("llama"), tmp_path / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UnsupportedBase, match="safetensors"):
        check_config(model)
    with pytest.raises(UnsupportedBase, match="no readable config"):
        check_config(tmp_path)


def test_the_digest_follows_the_content(tiny_models: TinyModels, tmp_path: Path) -> None:
    same = changed(tiny_models("llama"), tmp_path / "same")
    first, again = (prepare_base(str(same), tmp_path / "cache") for _ in range(2))
    other = changed(tiny_models("llama"), tmp_path / "other", rms_norm_eps=1e-3)
    assert first == again
    assert prepare_base(str(other), tmp_path / "cache").digest != first.digest


def test_two_processes_may_convert_the_default_base_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, target: Path) -> None:
        for directory in (tmp_path / "bases" / base_dir.DEFAULT_NAME, target):
            directory.mkdir(exist_ok=True)
            (directory / "config.json").write_text("{}")

    monkeypatch.setattr(base_dir, "_convert_gguf", convert)
    found = base_dir._default_base(tmp_path, lambda line: None)
    assert [path.name for path in found.parent.iterdir()] == [base_dir.DEFAULT_NAME]


def test_the_default_base_is_converted_once_and_makes_sense(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert (config["rope_theta"], config["rms_norm_eps"], config["tie_word_embeddings"]) == (100000.0, 1e-5, True)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert "Paris" in tokenizer.decode(made[0])
    assert tokenizer.chat_template
