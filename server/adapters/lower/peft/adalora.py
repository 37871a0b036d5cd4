"""AdaLoRA (Zhang et al. 2023) as PEFT stores it: ``Δ = B diag(E) A * alpha / (init_r + 1e-5)``, pruned ranks left out."""

from __future__ import annotations

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, integer, no_effect, only
from server.adapters.lower.peft.lora import METHOD as LORA
from server.adapters.lower.peft.wrapped import Shapes, tensor_groups, with_saved_modules
from server.adapters.lower.source import Source

_EPSILON = 1e-5


def lower(source: Source, base: Base) -> Program:
    """Each triple to one low-rank term. The scale divides by the rank that training began with, not the stored one."""
    program = Program()
    init_rank = source.config.get("init_r", 12)
    alpha = source.config.get("lora_alpha", 8)
    scale = (alpha if alpha > 0 else init_rank) / (init_rank + _EPSILON)
    shapes: Shapes = {"lora_A": ("r", "in"), "lora_B": ("out", "r"), "lora_E": ("r", 1)}
    for group in tensor_groups(source, base, "lora_", shapes, may_be_empty=True):
        if group.sizes["r"]:
            edit = program.linear(group.site)
            edit.down, edit.up = group["lora_A"], (group["lora_B"] * group["lora_E"].T * scale).T
    return with_saved_modules(source, base, program)


METHOD = Method(
    name="ADALORA",
    summary="low rank, with the stored (pruned) ranks",
    fields={
        **LORA.fields,
        "init_r": integer(1, 4096),
        "use_dora": only(False, None),
        "use_rslora": no_effect,
        "lora_bias": only(False, None),
        "init_lora_weights": no_effect,
        "trainable_token_indices": only(None),
        "alora_invocation_tokens": only(None),
        **dict.fromkeys(("use_bdlora", "kasa_config", "velora_config", "monteclora_config"), only(None, False)),
        **dict.fromkeys(("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"), no_effect),
    },
    lower=lower,
)
