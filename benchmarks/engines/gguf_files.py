"""The base and LoRA adapters as llama.cpp reads them: GGUF with the same weights, in bfloat16. Knows Llama only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

_PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOPS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def base_gguf(base: Path, directory: Path) -> Path:
    """The base's file, written unless it is there."""
    path = directory / "base.gguf"
    if path.exists():
        return path
    config: dict[str, Any] = json.loads((base / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    directory.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), "llama")
    writer.add_name("bench")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    _add_tokenizer(writer, base)
    for name, tensor in load_file(base / "model.safetensors").items():
        place, _, kind = name.rpartition(".")
        if place.endswith(("q_proj", "k_proj")):
            tensor = _interleaved(tensor, heads if place.endswith("q_proj") else kv_heads)
        _add(writer, f"{_gguf_name(place)}.{kind}", tensor)
    _finish(writer, part, path)
    return path


def lora_gguf(adapter: Path, base: Path, directory: Path) -> Path:
    """A LoRA adapter's file, written unless it is there."""
    path = directory / adapter.parent.name / f"{adapter.name}.gguf"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    model: dict[str, Any] = json.loads((base / "config.json").read_text())
    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text())
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(part), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        place, _, kind = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if kind == "lora_B" and place.endswith("q_proj"):
            tensor = _interleaved(tensor, model["num_attention_heads"])
        if kind == "lora_B" and place.endswith("k_proj"):
            tensor = _interleaved(tensor, model["num_key_value_heads"])
        _add(writer, f"{_gguf_name(place)}.weight.{kind.lower()}", tensor)
    _finish(writer, part, path)
    return path


def _add_tokenizer(writer: gguf.GGUFWriter, base: Path) -> None:
    """Prompts come as token ids, but llama.cpp loads no model without a vocabulary."""
    tokenizer: dict[str, Any] = json.loads((base / "tokenizer.json").read_text())
    config: dict[str, Any] = json.loads((base / "config.json").read_text())
    tokens = [f"[PAD{index}]" for index in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for item in tokenizer["added_tokens"]:
        tokens[item["id"]], types[item["id"]] = item["content"], gguf.TokenType.CONTROL
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


def _gguf_name(place: str) -> str:
    if place in _TOPS:
        return _TOPS[place]
    layer, _, part = place.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_PARTS[part]}"


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows in llama.cpp's order of a head's rotary pairs: neighbours instead of halves."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    """Matrices in bfloat16, vectors in float32, as llama.cpp wants them."""
    if tensor.dim() == 1:
        writer.add_tensor(name, tensor.float().numpy())
        return
    raw = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    writer.add_tensor(name, np.ascontiguousarray(raw), raw_dtype=gguf.GGMLQuantizationType.BF16)


def _finish(writer: gguf.GGUFWriter, part: Path, path: Path) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, path)
