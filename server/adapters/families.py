"""The parts of a transformer layer by their names, per model family. A table, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Module names within one layer; ``layers`` is the path of the list of layers, without the backbone's prefix.

    ``query``, ``key``, ``value`` name one fused linear where the family has one. ``gate`` is empty where there is none. ``attention_norm``
    and ``mlp_norm`` read the residual stream before the sub-layer (pre-norm) or after the addition (``post_norm``); they are empty
    where the family does more than that, and then no bottleneck can stand there. ``pooler`` is the linear, outside the layers, that
    sentence classifiers read the first token through; the served backbone is loaded without it.
    """

    layers: str
    attention: str
    query: str
    key: str
    value: str
    attention_out: str
    up: str
    mlp_out: str
    attention_norm: str
    mlp_norm: str
    gate: str = ""
    post_norm: bool = False
    pooler: str = ""

    @property
    def is_encoder(self) -> bool:
        """Whether the family reads a whole text at once and generates nothing. Those served are the post-norm ones."""
        return self.post_norm

    @property
    def backbone_arguments(self) -> dict[str, bool]:
        """What an encoder's class is told, so that it leaves its pooler out."""
        return {"add_pooling_layer": False} if self.pooler else {}


_LLAMA = LayerNames(
    layers="layers",
    attention="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    attention_out="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    mlp_out="mlp.down_proj",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
)
_BERT = LayerNames(
    layers="encoder.layer",
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_out="attention.output.dense",
    up="intermediate.dense",
    mlp_out="output.dense",
    attention_norm="attention.output.LayerNorm",
    mlp_norm="output.LayerNorm",
    post_norm=True,
    pooler="pooler.dense",
)
FAMILIES: dict[str, LayerNames] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    # Norms stand between a sub-layer and the addition, so that what is added is not the last linear's output.
    "gemma2": LayerNames(
        layers="layers",
        attention="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        attention_out="self_attn.o_proj",
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        mlp_out="mlp.down_proj",
        attention_norm="",
        mlp_norm="",
    ),
    "phi3": LayerNames(
        layers="layers",
        attention="self_attn",
        query="self_attn.qkv_proj",
        key="self_attn.qkv_proj",
        value="self_attn.qkv_proj",
        attention_out="self_attn.o_proj",
        gate="mlp.gate_up_proj",
        up="mlp.gate_up_proj",
        mlp_out="mlp.down_proj",
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
    ),
    "gpt2": LayerNames(
        layers="h",
        attention="attn",
        query="attn.c_attn",
        key="attn.c_attn",
        value="attn.c_attn",
        attention_out="attn.c_proj",
        up="mlp.c_fc",
        mlp_out="mlp.c_proj",
        attention_norm="ln_1",
        mlp_norm="ln_2",
    ),
    "opt": LayerNames(
        layers="decoder.layers",
        attention="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        attention_out="self_attn.out_proj",
        up="fc1",
        mlp_out="fc2",
        attention_norm="self_attn_layer_norm",
        mlp_norm="final_layer_norm",
    ),
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": LayerNames(
        layers="transformer.layer",
        attention="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_out="attention.out_lin",
        up="ffn.lin1",
        mlp_out="ffn.lin2",
        attention_norm="sa_layer_norm",
        mlp_norm="output_layer_norm",
        post_norm=True,
    ),
}
SublayerKind = Literal["attention", "output"]
