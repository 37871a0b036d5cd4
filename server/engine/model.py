"""Loading the base model: Hugging Face code unmodified, with paged attention. Knows families, not adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from server.adapters.base_spec import BaseSpec, describe
from server.adapters.families import FAMILIES
from server.engine import attention, encoder_attention
from server.engine.sentence import embedding_pooling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The frozen base: a causal language model, or an encoder's backbone, which has no head.

    ``final_softcap`` is what the family does to logits after its head (Gemma 2). ``embedding`` is how a text's vector is pooled ("": not
    served).
    """

    model: nn.Module
    spec: BaseSpec
    num_layers: int
    kv_heads: int
    head_dim: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    final_softcap: float | None
    embedding: str

    @property
    def backbone(self) -> nn.Module:
        return self.model.base_model  # type: ignore[return-value]

    @property
    def head(self) -> nn.Module:
        return self.model.get_output_embeddings()  # type: ignore[operator, no-any-return]

    def finish_logits(self, logits: Tensor) -> Tensor:
        """What the family does after its head."""
        if self.final_softcap is None:
            return logits
        return torch.tanh(logits / self.final_softcap) * self.final_softcap


def load_base(directory: Path, digest: str, dtype: str, device: str) -> BaseModel:
    """Load a prepared base directory (see base_dir) for inference. Raises ValueError when the directory lacks weights."""
    if torch.device(device).type == "cuda":
        # What streams, recordings and Triton take when nobody says which.
        torch.cuda.set_device(device)
    # The implementation name sits on the config, which is ours alone: nothing else in the process may share it.
    config: Any = AutoConfig.from_pretrained(directory)
    names = FAMILIES[config.model_type]
    kind, implementation = (AutoModel, encoder_attention.NAME) if names.is_encoder else (AutoModelForCausalLM, attention.NAME)
    arguments = names.backbone_arguments if names.is_encoder else {}
    loaded: Any = kind.from_pretrained(
        directory,
        config=config,
        dtype=DTYPES[dtype],
        attn_implementation=implementation,
        output_loading_info=True,
        **arguments,
    )
    model, report = loaded
    if report["missing_keys"]:
        raise ValueError(f"{directory} lacks weights of its model: {sorted(report['missing_keys'])[:3]}")
    model.requires_grad_(False).eval().to(device)
    spec = describe(model, digest, dtype)
    if not names.is_encoder:
        # GPT-2 would look for padding in every step, which waits for the device. There is none: batches are ragged.
        model.config.pad_token_id = None
    return BaseModel(
        model=model,
        spec=spec,
        num_layers=spec.num_layers,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_positions=spec.max_positions,
        eos_token_ids=_eos(getattr(model, "generation_config", None), config),
        final_softcap=getattr(config, "final_logit_softcapping", None),
        embedding=embedding_pooling(directory, "mean" if names.is_encoder else "last"),
    )


def is_encoder(directory: Path) -> bool:
    """Whether a prepared base directory holds an encoder."""
    return FAMILIES[AutoConfig.from_pretrained(directory).model_type].is_encoder


def _eos(generation_config: Any, config: Any) -> tuple[int, ...]:
    found = getattr(generation_config, "eos_token_id", None)
    found = getattr(config, "eos_token_id", None) if found is None else found
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)
