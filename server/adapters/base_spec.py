"""What lowering and attaching must know of a base model: its family, its sites and how they are tied.

Built from a module tree (a meta-device one is enough), never from weights. Knows no adapter and no method.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

SiteKind = Literal["linear", "norm", "embedding", "head"]


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """A named module of the base where edits attach.

    ``name`` is the Hugging Face module path (``model.layers.0.self_attn.q_proj``). For linears and the head
    ``in_features``/``out_features`` are in nn.Linear orientation, also when the stored weight is transposed
    (``transposed``: GPT-2's Conv1D). For embeddings they are (vocab, dim); for norms both are the width.
    ``layer`` is None outside the decoder layers. ``embed_scale`` is what the embedding multiplies its rows by (Gemma).
    """

    name: str
    kind: SiteKind
    in_features: int
    out_features: int
    has_bias: bool
    layer: int | None
    transposed: bool = False
    embed_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The base model as lowering sees it. ``backbone_prefix`` is e.g. ``model.``; site names include it."""

    family: str
    digest: str
    dtype: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    backbone_prefix: str
    tied_head: bool
    embedding: str
    head: str
    sites: tuple[SiteSpec, ...]

    def site(self, name: str) -> SiteSpec | None:
        return next((site for site in self.sites if site.name == name), None)

    def by_name(self) -> dict[str, SiteSpec]:
        return {site.name: site for site in self.sites}

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BaseSpec:
        return cls(**{**data, "sites": tuple(SiteSpec(**site) for site in data["sites"])})


def describe(model: nn.Module, digest: str, dtype: str) -> BaseSpec:
    """Read the sites off a Hugging Face causal language model (weights may be on the meta device)."""
    config: Any = model.config
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    layer_count = int(config.num_hidden_layers)
    sites: list[SiteSpec] = []
    for name, module in model.named_modules():
        kind = _kind(module, embedding, head)
        if kind is None:
            continue
        sites.append(_site(name, module, kind))
    return BaseSpec(
        family=str(config.model_type),
        digest=digest,
        dtype=dtype,
        hidden_size=int(config.hidden_size),
        vocab_size=int(head.weight.shape[0]),
        num_layers=layer_count,
        backbone_prefix=f"{model.base_model_prefix}.",
        tied_head=bool(config.tie_word_embeddings),
        embedding=names[embedding],
        head=names[head],
        sites=tuple(sites),
    )


def _kind(module: nn.Module, embedding: nn.Module, head: nn.Module) -> SiteKind | None:
    if module is head:
        return "head"
    if module is embedding:
        return "embedding"
    kind = type(module).__name__
    if isinstance(module, nn.Linear) or kind == "Conv1D":
        return "linear"
    if isinstance(module, nn.LayerNorm) or kind.endswith("RMSNorm"):
        return "norm"
    return None


def _site(name: str, module: nn.Module, kind: SiteKind) -> SiteSpec:
    weight: Any = module.weight
    bias = getattr(module, "bias", None)
    transposed = type(module).__name__ == "Conv1D"
    if kind == "norm":
        shape = (int(weight.shape[0]), int(weight.shape[0]))
    elif kind == "embedding" or transposed:
        shape = (int(weight.shape[0]), int(weight.shape[1]))
    else:
        shape = (int(weight.shape[1]), int(weight.shape[0]))
    return SiteSpec(
        name=name,
        kind=kind,
        in_features=shape[0],
        out_features=shape[1],
        has_bias=bias is not None,
        layer=_layer(name),
        transposed=transposed,
        embed_scale=float(getattr(module, "scalar_embed_scale", 1.0)),
    )


def _layer(name: str) -> int | None:
    """The first number in the module path: ``model.layers.3.mlp`` → 3."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)
