"""Loading the base model: Hugging Face code unmodified, with paged attention. Knows families, not adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from server.adapters.base_spec import BaseSpec, describe
from server.engine import attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The frozen base. ``final_softcap`` is what the family does to logits after its head (Gemma 2)."""

    model: nn.Module
    spec: BaseSpec
    num_layers: int
    kv_heads: int
    head_dim: int
    max_positions: int
    eos_token_ids: tuple[int, ...]
    final_softcap: float | None

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
    """Load a prepared base directory (see base_dir) for inference."""
    # The implementation name sits on the config, which is ours alone: nothing else in the process may share it.
    config: Any = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(
        directory, config=config, dtype=DTYPES[dtype], attn_implementation=attention.NAME
    )
    model.requires_grad_(False).eval().to(device)  # type: ignore[no-untyped-call]
    return BaseModel(
        model=model,
        spec=describe(model, digest, dtype),
        num_layers=int(config.num_hidden_layers),
        kv_heads=int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads),
        max_positions=int(config.max_position_embeddings),
        eos_token_ids=_eos(model.generation_config, config),
        final_softcap=getattr(config, "final_logit_softcapping", None),
    )


def _eos(generation_config: Any, config: Any) -> tuple[int, ...]:
    found = getattr(generation_config, "eos_token_id", None)
    found = config.eos_token_id if found is None else found
    if found is None:
        return ()
    return tuple(found) if isinstance(found, list | tuple) else (int(found),)
