"""AdaLoRA (Zhang et al. 2023) as PEFT stores it: ``Δ = B diag(E) A * alpha / (init_r + 1e-5)``, pruned ranks left out."""

from __future__ import annotations

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.lora import METHOD as LORA
from server.adapters.lower.method import Method, integer, no_effect, only
from server.adapters.lower.replaced import lower_biases, lower_replaced_modules
from server.adapters.lower.source import Source

_EPSILON = 1e-5


def lower(source: Source, base: Base) -> Program:
    """Each triple to one low-rank term. The scale divides by the rank that training began with, not the stored one."""
    program = Program()
    init_rank = source.config.get("init_r", 12)
    alpha = source.config.get("lora_alpha", 8)
    scale = (alpha if alpha > 0 else init_rank) / (init_rank + _EPSILON)
    for site in source.sites:
        spec = base.spec.site(site)
        if spec is None or not source.has(site, "lora_A"):
            continue
        down = source.take(site, "lora_A", (None, spec.in_features))
        up = source.take(site, "lora_B", (spec.out_features, None))
        weights = source.take(site, "lora_E", (None, 1))
        if down is None or up is None or weights is None or not down.shape[0] == up.shape[1] == weights.shape[0]:
            source.fault("missing_tensor", site, "lora_A, lora_B and lora_E of one rank are needed")
        elif down.shape[0]:
            edit = program.linear(site)
            edit.down = down.to(base.compute)
            edit.up = (up.to(base.compute) * weights.to(base.compute).T * scale).T
    lower_biases(source, base, program)
    lower_replaced_modules(source, base, program)
    return program


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
