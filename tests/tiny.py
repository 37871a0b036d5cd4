"""Tiny random models of every family, with a byte-level tokenizer: real objects that run in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "opt")
ENCODERS = ("bert", "roberta", "distilbert")
SPECIAL = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
VOCAB = 256 + len(SPECIAL) + 27  # not a round number, so that a shape mistake shows
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.35,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILY: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 16},
    "gemma2": {
        "sliding_window": 16,
        "final_logit_softcapping": 8.0,
        "attn_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": True,
    },
    "qwen2": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "tie_word_embeddings": True},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "tie_word_embeddings": True},
    "phi3": {"sliding_window": None, "original_max_position_embeddings": 512},
    "roberta": {"max_position_embeddings": 514},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
}
_DECODERS_ONLY = ("num_key_value_heads", "head_dim", "bos_token_id", "eos_token_id")
_RENAMED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def make_tiny(family: str, directory: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Write a random model of a family with its tokenizer. Biases and norms are random too, so that nothing is neutral."""
    settings = {**_COMMON, **_FAMILY.get(family, {}), **overrides}
    if family in ("gpt2", "opt"):
        settings = {
            name: value
            for name, value in settings.items()
            if name not in ("num_key_value_heads", "head_dim", "intermediate_size")
        }
    if family in ENCODERS:
        unknown = {*_DECODERS_ONLY, *(_RENAMED if family == "distilbert" else ())}
        settings = {name: value for name, value in settings.items() if name not in unknown}
    torch.manual_seed(seed)
    kind = AutoModel if family in ENCODERS else AutoModelForCausalLM
    model = kind.from_config(AutoConfig.for_model(family, **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            centre = 1.0 if "norm" in name.lower() or "ln_" in name else 0.0
            centre = 0.0 if family == "gemma2" and "norm" in name else centre
            parameter.data = centre + 0.2 * torch.randn(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(directory)
    tiny_tokenizer(wraps=family in ENCODERS).save_pretrained(directory)
    return directory


def tiny_tokenizer(*, wraps: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, plus special tokens; it round-trips every string. ``wraps``: as encoders have it, with a token around each text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if wraps:
        tokenizer.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=None if wraps else CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
