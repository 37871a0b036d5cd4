"""What lowering and attaching must know of a base model: its family, its sites and how they are tied.

Built from a module tree (a meta-device one is enough), never from weights. Knows no adapter and no method.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

from server.adapters.families import FAMILIES, LayerNames, SublayerKind

SiteKind = Literal["linear", "norm", "embedding", "head", "attention", "layer"]


@dataclass(frozen=True, slots=True)
class SiteSpec:
    """A named module of the base where edits attach.

    ``name`` is the Hugging Face module path (``model.layers.0.self_attn.q_proj``). For linears and the head
    ``in_features``/``out_features`` are in nn.Linear orientation, also when the stored weight is transposed
    (``transposed``: GPT-2's Conv1D). For embeddings they are (vocab, dim); for norms both are the width.
    ``layer`` is None outside the layers. ``embed_scale`` is what the embedding multiplies its rows by (Gemma). An attention module
    and a whole layer are sites too; both widths are the hidden size.
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
class Sublayer:
    """Where a layer's attention or MLP ("output") joins the residual stream.

    Bottlenecks attach at ``site``. Pre-norm: the sub-layer's last linear; ``other`` is the norm that read the residual stream before.
    ``post_norm``: the norm after the addition, which reads their sum; ``other`` is the sub-layer's last linear.
    """

    layer: int
    kind: SublayerKind
    site: str
    other: str
    post_norm: bool


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The base model as lowering sees it.

    ``backbone_prefix`` is e.g. ``model.``; site names of generating models include it. ``head`` is "" for encoders, which generate nothing
    (``is_encoder``); their ``embedding_norm`` is the norm after the sum of embeddings. ``position_offset`` is the id of the first position
    (RoBERTa: 2); ``max_positions`` counts usable positions.
    """

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
    sublayers: tuple[Sublayer, ...] = ()
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    is_encoder: bool = False
    embedding_norm: str = ""
    position_offset: int = 0
    max_positions: int = 0

    def site(self, name: str) -> SiteSpec | None:
        return next((site for site in self.sites if site.name == name), None)

    def by_name(self) -> dict[str, SiteSpec]:
        return {site.name: site for site in self.sites}

    @property
    def names(self) -> LayerNames:
        """The family's names of a layer's parts."""
        return FAMILIES[self.family]

    def layer_site(self, layer: int, part: str) -> str:
        """The full name of a part of a layer: ``layer_site(3, "self_attn.q_proj")``; of the layer itself for ""."""
        prefix = "" if self.is_encoder else self.backbone_prefix
        return f"{prefix}{self.names.layers}.{layer}.{part}".removesuffix(".")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BaseSpec:
        parts = {"sites": SiteSpec, "sublayers": Sublayer}
        return cls(**{**data, **{name: tuple(kind(**item) for item in data[name]) for name, kind in parts.items()}})


def describe(model: nn.Module, digest: str, dtype: str) -> BaseSpec:
    """Read the sites off a Hugging Face model (weights may be on the meta device): a causal language model, or an encoder's backbone."""
    config: Any = model.config
    is_encoder = FAMILIES[config.model_type].is_encoder
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    head = None if is_encoder else model.get_output_embeddings()  # type: ignore[operator]
    names = {module: name for name, module in model.named_modules()}
    layer_count = int(config.num_hidden_layers)
    heads = int(config.num_attention_heads)
    # RoBERTa's first rows of the table belong to padding.
    offset = int(config.pad_token_id) + 1 if config.model_type == "roberta" else 0
    sites: list[SiteSpec] = []
    for name, module in model.named_modules():
        kind = _kind(module, embedding, head)
        if kind is None:
            continue
        sites.append(_site(name, module, kind))
    spec = BaseSpec(
        family=str(config.model_type),
        digest=digest,
        dtype=dtype,
        hidden_size=int(config.hidden_size),
        vocab_size=int((embedding if head is None else head).weight.shape[0]),
        num_layers=layer_count,
        backbone_prefix=f"{model.base_model_prefix}.",
        tied_head=head is not None and bool(config.tie_word_embeddings),
        embedding=names[embedding],
        head="" if head is None else names[head],
        sites=tuple(sites),
        num_heads=heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        is_encoder=is_encoder,
        embedding_norm="embeddings.LayerNorm" if is_encoder else "",
        position_offset=offset,
        max_positions=int(config.max_position_embeddings) - offset,
    )
    parts: tuple[tuple[str, SiteKind], ...] = ((spec.names.attention, "attention"), ("", "layer"))
    whole = [
        SiteSpec(spec.layer_site(layer, part), kind, spec.hidden_size, spec.hidden_size, False, layer)
        for layer in range(layer_count)
        for part, kind in parts
    ]
    return replace(spec, sites=(*spec.sites, *whole), sublayers=tuple(_sublayers(spec)))


def _sublayers(spec: BaseSpec) -> Iterator[Sublayer]:
    names = spec.names
    for layer in range(spec.num_layers):
        pairs: tuple[tuple[SublayerKind, str, str], ...] = (
            ("attention", names.attention_out, names.attention_norm),
            ("output", names.mlp_out, names.mlp_norm),
        )
        for kind, linear, norm in pairs:
            if norm:
                site, other = (norm, linear) if names.post_norm else (linear, norm)
                yield Sublayer(layer, kind, spec.layer_site(layer, site), spec.layer_site(layer, other), names.post_norm)


def _kind(module: nn.Module, embedding: nn.Module, head: nn.Module | None) -> SiteKind | None:
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
