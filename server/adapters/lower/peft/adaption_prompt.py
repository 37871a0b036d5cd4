"""Adaption prompts (LLaMA-Adapter, Zhang et al. 2023) as PEFT stores them: gated attention over a prompt, beside a layer's own attention.

Formulas: docs/PEFT.md, and PEFT 0.21's ``tuners/adaption_prompt/layer.py``.
"""

from __future__ import annotations

from torch import Tensor

from server.adapters.ir import Program, SideEdit
from server.adapters.lower.base import Base
from server.adapters.lower.method import COMMON_FIELDS, Method, integer, no_effect, optional
from server.adapters.lower.source import Source

FAMILIES = ("llama", "mistral", "gpt2")
"""Those that PEFT has the method for."""
_COUNT = optional(integer(1, 1 << 16))


def lower(source: Source, base: Base) -> Program:
    """``o_proj(gate * softmax(q K^T / sqrt(d)) V)`` with K and V of the prompt by the base's own projections; on GPT-2 without ``o_proj``."""
    program = Program()
    spec = base.spec
    if spec.family not in FAMILIES:
        message = f"PEFT has adaption prompts for {', '.join(FAMILIES)} only"
        source.fault("unsupported_method", "adapter_config.json: peft_type", message, found=spec.family)
        source.stop_if_faulty()
    for layer in range(spec.num_layers):
        site = spec.layer_site(layer, spec.names.attention)
        if not source.has(site, "adaption_prompt") and not source.has(site, "adaption_gate"):
            continue
        prompt = source.take(site, "adaption_prompt", (1, source.config.get("adapter_len"), spec.hidden_size))
        gate = source.take(site, "adaption_gate", (1,))
        if prompt is None or gate is None:
            source.fault("missing_tensor", site, "a prompt and its gate belong together; one is missing or does not fit")
            continue
        key, value = _project(base, layer, prompt[0].to(base.compute))
        program.add(site, SideEdit(key, value * gate.to(base.compute), projected=spec.names.key != spec.names.value))
    if source.config.get("adapter_layers") not in (None, len(program.edits)):
        source.field_fault("adapter_layers", "tensors and config disagree on the number of layers", str(len(program.edits)))
    return program


def _project(base: Base, layer: int, prompt: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``(length, kv_heads, head_dim)`` of the prompt ``(length, hidden)``, neither rotated."""
    spec = base.spec

    def project(part: str) -> Tensor:
        site = spec.layer_site(layer, part)
        return prompt @ base.weight(site).T + base.bias(site)

    if spec.names.key == spec.names.value:
        _, key, value = project(spec.names.key).chunk(3, dim=-1)
    else:
        key, value = project(spec.names.key), project(spec.names.value)
    shape = (prompt.shape[0], spec.num_kv_heads, spec.head_dim)
    return key.reshape(shape), value.reshape(shape)


METHOD = Method(
    name="ADAPTION_PROMPT",
    summary="gated attention over keys and values of its own, beside the layer's attention (Llama, Mistral, GPT-2)",
    fields={
        **COMMON_FIELDS,
        "adapter_len": _COUNT,
        "adapter_layers": _COUNT,
        # The tensors' keys say which modules.
        "target_modules": no_effect,
    },
    lower=lower,
)
