"""The base model without its weights: what its config alone says about modules, on the meta device. Knows transformers, no adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from server.adapters.families import FAMILIES


def skeleton(directory: Path) -> nn.Module:
    """The modules that the engine serves: a causal language model, or an encoder's backbone without its pooler."""
    config: Any = AutoConfig.from_pretrained(directory)
    names = FAMILIES[config.model_type]
    with torch.device("meta"):
        if names.is_encoder:
            model: nn.Module = AutoModel.from_config(config, **names.backbone_arguments)  # type: ignore[no-untyped-call]
        else:
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model
