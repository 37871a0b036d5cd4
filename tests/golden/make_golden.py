"""Make the golden checkpoints of AdapterHub: ``make golden``, in an environment with adapters 1.3.0 and the client, never in ``make test``.

    bases/<family>/            tiny random base models
    cases/<family>-<case>/     a checkpoint as the library saved it, and expected.safetensors: for prompt ``i`` its ids ``prompt.i``, the ids
                               that follow greedily ``greedy.i`` and the logits ``logits.i`` at every position of both. For encoders
                               ``hidden.i``, the last hidden states, and with a prediction head ``scores.i``
    refused/<family>-<case>/   checkpoints that no server can serve token by token

Every tensor of an adapter is random, so that nothing is neutral. Outputs come from the adapter as it is read back on a clean base, by forward
passes without a cache and with eager attention: with transformers 4.57 the library's cache and its SDPA prefixes are wrong.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import adapters
import torch
from adapters import (
    AdapterPlusConfig,
    BertAdapterModel,
    CompacterConfig,
    CompacterPlusPlusConfig,
    DoRAConfig,
    DoubleSeqBnConfig,
    DynamicAdapterFusionConfig,
    IA3Config,
    LoRAConfig,
    LoReftConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    UniPELTConfig,
)
from adapters.composition import Fuse
from adapters.configuration.adapter_config import NoReftConfig, VeraConfig
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from medley_client.convert import convert

PROMPTS = ([9, 41, 31], [3, 60, 7, 7, 22, 48, 51, 13, 36, 5, 29, 17])
GREEDY = 6
NAME = "golden"
_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.35,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "rope_theta": 10000.0},
    "qwen2": {"num_key_value_heads": 2, "rope_theta": 10000.0, "tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 48},
    "bert": {"type_vocab_size": 2},
}
_ON_ALL = {"attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True}
_REFT = {"r": 2, "prefix_positions": 3, "suffix_positions": 0}


@dataclass(frozen=True)
class Case:
    """One adapter on some families. ``pickled``: the library cannot write it as safetensors. ``model_class`` is what takes the adapter:
    a backbone for encoders and a causal model for decoders, unless it says otherwise. ``with_head`` saves the class's head with the adapter,
    as the library does by default; ``head`` adds one first, ``lm_head_noise`` trains a causal model's."""

    name: str
    families: str
    config: Callable[[], Any] = SeqBnConfig
    pickled: bool = False
    children: tuple[Any, ...] = ()
    fusion: str | dict[str, Any] = ""
    model_class: Any = None
    with_head: bool = False
    head: Callable[[Any], None] = lambda _: None
    lm_head_noise: float = 0.0
    refused: bool = False
    scale: float = 0.2


def _classifier(model: Any) -> None:
    model.add_classification_head(NAME, num_labels=3, id2label={0: "no", 1: "maybe", 2: "yes"})


def _pooled_classifier(model: Any) -> None:
    model.add_classification_head(NAME, num_labels=2, layers=1, use_pooler=True)


def _multi_label_classifier(model: Any) -> None:
    model.add_classification_head(NAME, num_labels=3, multilabel=True, activation_function=None)


def _tagger(model: Any) -> None:
    model.add_tagging_head(NAME, num_labels=4)


def _bottlenecks() -> tuple[Any, Any]:
    return SeqBnConfig(reduction_factor=8), SeqBnConfig(reduction_factor=4)


CASES = (
    Case("double_seq_bn", "llama gpt2 qwen2 bert", lambda: DoubleSeqBnConfig(reduction_factor=8)),
    Case("seq_bn", "llama gpt2 qwen2 bert", lambda: SeqBnConfig(reduction_factor=8)),
    Case("par_bn", "llama gpt2 qwen2 bert", lambda: ParBnConfig(reduction_factor=8)),
    Case("scaled_par_bn", "llama bert", lambda: ParBnConfig(reduction_factor=8, scaling="learned")),
    Case("adapter_plus", "llama gpt2 bert", lambda: AdapterPlusConfig(reduction_factor=8, stochastic_depth=0.0)),
    Case("compacter", "llama gpt2", lambda: CompacterConfig(reduction_factor=4), scale=0.5),
    Case("compacterpp", "llama", lambda: CompacterPlusPlusConfig(reduction_factor=4), scale=0.5),
    # From bare backbones the library does not save what layers share.
    Case("compacterpp", "bert", lambda: CompacterPlusPlusConfig(reduction_factor=4), model_class=BertAdapterModel, scale=0.5),
    Case(
        "phm_own", "llama", lambda: CompacterConfig(reduction_factor=4, shared_phm_rule=False, factorized_phm_W=False), scale=0.5
    ),
    Case(
        "phm_factors",
        "llama",
        lambda: CompacterPlusPlusConfig(reduction_factor=4, factorized_phm_rule=True, phm_bias=False),
        scale=0.7,
    ),
    Case("ln_before", "llama bert", lambda: DoubleSeqBnConfig(reduction_factor=8, ln_before=True), pickled=True),
    Case("ln_after", "llama bert", lambda: DoubleSeqBnConfig(reduction_factor=8, ln_after=True)),
    Case(
        "ln_both",
        "llama gpt2",
        lambda: SeqBnConfig(reduction_factor=8, ln_before=True, ln_after=True, adapter_residual_before_ln=True),
        pickled=True,
    ),
    Case("ln_parallel", "llama bert", lambda: ParBnConfig(reduction_factor=8, ln_before=True, ln_after=True), pickled=True),
    Case("residual_late", "llama bert", lambda: SeqBnConfig(reduction_factor=8, residual_before_ln=False)),
    Case("residual_post_add", "bert", lambda: SeqBnConfig(reduction_factor=8, residual_before_ln="post_add")),
    Case("residual_lost", "llama bert", lambda: DoubleSeqBnConfig(reduction_factor=8, original_ln_after=False)),
    Case("layers", "llama", lambda: DoubleSeqBnConfig(reduction_factor={"0": 4, "default": 16}, leave_out=[1])),
    Case("reduction_map", "gpt2", lambda: DoubleSeqBnConfig(reduction_factor={"0": 4, "default": 16}, non_linearity="leakyrelu")),
    Case("lora", "llama gpt2 qwen2 bert", lambda: LoRAConfig(r=4, alpha=6, **_ON_ALL)),
    Case("lora_two", "gpt2", lambda: LoRAConfig(r=4, alpha=6, attn_matrices=["k", "v"])),
    Case("dora", "llama bert qwen2", lambda: DoRAConfig(r=4, alpha=6, **_ON_ALL)),
    Case("vera", "bert", lambda: VeraConfig(r=4, alpha=6), model_class=BertAdapterModel),
    Case("ia3", "llama gpt2 qwen2 bert", lambda: IA3Config(alpha=2)),
    Case("prefix", "llama gpt2 bert", lambda: PrefixTuningConfig(prefix_length=5, bottleneck_size=8), pickled=True),
    Case("prefix_flat", "llama gpt2", lambda: PrefixTuningConfig(prefix_length=5, flat=True), pickled=True),
    Case(
        "mam",
        "llama gpt2 bert",
        lambda: MAMConfig(PrefixTuningConfig(prefix_length=5, bottleneck_size=8), ParBnConfig(reduction_factor=8)),
        pickled=True,
    ),
    Case("prompt", "bert", lambda: PromptTuningConfig(prompt_length=5)),
    Case("prompt_after_bos", "bert", lambda: PromptTuningConfig(prompt_length=5, combine="prefix_after_bos")),
    Case("loreft", "llama gpt2 qwen2 bert", lambda: LoReftConfig(**_REFT)),
    Case("noreft", "llama", lambda: NoReftConfig(**_REFT, non_linearity="gelu")),
    Case("fusion", "llama gpt2 qwen2 bert", children=_bottlenecks(), fusion="dynamic"),
    Case("fusion_static", "llama", children=_bottlenecks(), fusion="static"),
    Case("fusion_houlsby", "llama bert", children=(DoubleSeqBnConfig(reduction_factor=8),) * 2, fusion="dynamic"),
    Case("classifier", "bert", model_class=BertAdapterModel, with_head=True, head=_classifier),
    Case("classifier_pooled", "bert", model_class=BertAdapterModel, with_head=True, head=_pooled_classifier),
    Case("classifier_many", "bert", model_class=BertAdapterModel, with_head=True, head=_multi_label_classifier),
    Case("tagger", "bert", model_class=BertAdapterModel, with_head=True, head=_tagger),
    Case("own_classifier", "bert", model_class=AutoModelForSequenceClassification, with_head=True),
    Case("own_tagger", "bert", model_class=AutoModelForTokenClassification, with_head=True),
    Case("lm_head", "llama gpt2", with_head=True),
    Case("lm_head_trained", "llama", with_head=True, lm_head_noise=0.2),
    Case("gated", "llama", lambda: SeqBnConfig(reduction_factor=8, use_gating=True), refused=True),
    Case("unipelt", "llama", lambda: UniPELTConfig(PrefixTuningConfig(prefix_length=3, bottleneck_size=4)), True, refused=True),
    Case("glow", "llama", lambda: SeqBnInvConfig(inv_adapter="glow"), refused=True),
    Case("nice", "llama", SeqBnInvConfig, refused=True),
    Case("prefix_leave_out", "llama", lambda: PrefixTuningConfig(prefix_length=3, flat=True, leave_out=[0]), True, refused=True),
    Case("loreft_suffix", "llama", lambda: LoReftConfig(r=2, prefix_positions=2, suffix_positions=2), refused=True),
    Case(
        "fusion_temperature",
        "llama",
        children=_bottlenecks(),
        fusion={**DynamicAdapterFusionConfig().to_dict(), "temperature": True},
        refused=True,
    ),
)


def make_base(family: str) -> None:
    """Write a tiny base, unless it is there. Its biases and norms are random too."""
    directory = Path("bases") / family
    if directory.exists():
        return
    torch.manual_seed(0)
    make = AutoModel if family == "bert" else AutoModelForCausalLM
    model = make.from_config(AutoConfig.for_model(family, **_COMMON, **_FAMILIES[family]))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            centre = 1.0 if ("norm" in name.lower() or "ln_" in name) and name.endswith("weight") else 0.0
            parameter.data = centre + 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory)


def load_base(family: str, model_class: Any = None) -> Any:
    """A clean base that can take adapters."""
    make = model_class or (AutoModel if family == "bert" else AutoModelForCausalLM)
    model = make.from_pretrained(Path("bases") / family, attn_implementation="eager").eval()
    if make is not BertAdapterModel:
        adapters.init(model)
    return model


def make_case(case: Case, family: str) -> None:
    """Create, randomise, save and read back one adapter; then record what it does."""
    directory = Path("refused" if case.refused else "cases") / f"{family}-{case.name}"
    shutil.rmtree(directory, ignore_errors=True)
    torch.manual_seed(9)
    model = load_base(family, case.model_class)
    children = {f"child_{letter}": config for letter, config in zip("ab", case.children, strict=False)} or {NAME: case.config()}
    for name, config in children.items():
        model.add_adapter(name, config=config)
    if case.fusion:
        model.add_adapter_fusion(list(children), case.fusion)
    case.head(model)
    if case.lm_head_noise:
        model.lm_head.weight.data += case.lm_head_noise * torch.randn(model.lm_head.weight.shape)
    _randomise(model, [*children, ",".join(children)], case.scale)
    for name in children:
        where = directory / "children" / name if case.fusion else directory
        where.mkdir(parents=True, exist_ok=True)
        model.save_adapter(str(where), name, with_head=case.with_head, use_safetensors=not case.pickled)
    if case.fusion:
        model.save_adapter_fusion(str(directory), ",".join(children), use_safetensors=True)
    if not case.refused:
        outputs = _outputs(_reloaded(case, family, directory, list(children)), case, family)
        plain = _outputs(load_base(family), replace(case, with_head=False), family)
        kind = "hidden" if family == "bert" else "logits"
        # An encoder's virtual tokens stand in front of what is compared.
        effect = max(float((outputs[key][-len(plain[key]) :] - plain[key]).abs().max()) for key in plain if kind in key)
        if effect < 1e-2:
            raise SystemExit(f"{family}-{case.name} changes nothing")
        save_file(outputs, directory / "expected.safetensors")
    if case.pickled:
        convert(directory)
    for pickle in directory.rglob("*.bin"):
        pickle.unlink()


def _randomise(model: Any, names: list[str], scale: float) -> None:
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if not any(f".{owner}." in f".{name}" for owner in names):
            continue
        noise = torch.randn(parameter.shape, generator=generator) * scale
        # Scales, norms and magnitudes mean something only around what they are.
        is_scale = (parameter.ndim == 1 and name.endswith(("weight", "scaling"))) or (
            "lora_B" in name and parameter.shape[-1] == 1
        )
        around = is_scale or any(part in name for part in (".m.weight", "vera_", "parametrizations"))
        parameter.data = parameter.data + noise if around else noise


def _reloaded(case: Case, family: str, directory: Path, names: list[str]) -> Any:
    model = load_base(family, case.model_class)
    places = {name: directory / "children" / name if case.fusion else directory for name in names}
    for path in places.values():
        model.load_adapter(str(path), with_head=case.with_head, use_safetensors=not case.pickled)
    if case.fusion:
        model.load_adapter_fusion(str(directory), use_safetensors=True)
    model.set_active_adapters(Fuse(*names) if case.fusion else NAME)
    return model.eval()


@torch.no_grad()
def _outputs(model: Any, case: Case, family: str) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for index, prompt in enumerate(PROMPTS):
        found[f"prompt.{index}"] = torch.tensor(prompt)
        if family == "bert":
            ids = torch.tensor([prompt])
            backbone = model.bert if hasattr(model, "bert") else model
            found[f"hidden.{index}"] = backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]
            if case.with_head:
                found[f"scores.{index}"] = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
            continue
        ids = list(prompt)
        while len(ids) < len(prompt) + GREEDY:
            ids.append(int(_logits(model, ids)[-1].argmax()))
        found[f"greedy.{index}"] = torch.tensor(ids[len(prompt) :])
        found[f"logits.{index}"] = _logits(model, ids)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    tokens = torch.tensor([ids])
    logits: torch.Tensor = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[0]
    return logits


def main() -> None:
    # The library writes the base's path into every config: a relative one.
    os.chdir(Path(__file__).parent)
    for family in _FAMILIES:
        make_base(family)
    for case in CASES:
        for family in case.families.split():
            make_case(case, family)
            print(f"{family}-{case.name}")  # noqa: T201 - a program that prints


if __name__ == "__main__":
    main()
