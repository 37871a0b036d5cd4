"""Compositions of different kinds in the engine equal their definition, written down once more over Hugging Face's own model. In fp64.

At every site ``y0 + sum w (edit(x) - y0)``; bottlenecks stand behind that, ``s + sum w (t - s)``; interventions are for real tokens only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache

from server.adapters.base_spec import BaseSpec
from server.adapters.bottleneck import Streams, bottleneck_reference, fusion_reference
from server.adapters.compose import Part, compose
from server.adapters.ir import (
    BottleneckEdit,
    Edit,
    FusionEdit,
    InterventionEdit,
    LinearEdit,
    NormEdit,
    Placement,
    Program,
    Prologue,
    SideEdit,
)
from server.engine.types import BASE
from tests.conftest import TinyModels
from tests.harness import greedy, load_base_for_lowering, make_engine, run
from tests.server.engine.test_prologue import prompt, same, write

TOLERANCE = 1e-9
LAYER = "model.layers.{}"
PROMPTS = {"one": prompt(1), "two": prompt(2, 5), "long": prompt(41, 9)}


class Noise:
    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(17)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64) * 0.4


def kinds(spec: BaseSpec) -> dict[str, Program]:
    """A program of every kind, on both layers."""
    noise, width = Noise(), spec.hidden_size
    made = {name: Program() for name in ("low rank", "scales", "norms", "side", "intervention", "added", "parallel", "fusion")}

    def bottleneck(placement: Placement) -> BottleneckEdit:
        return BottleneckEdit(placement, noise(3, width), noise(3, width), noise(3), noise(width))

    for index in range(spec.num_layers):
        layer = LAYER.format(index)
        for site in spec.sites:
            if site.layer == index and site.kind == "linear" and not site.name.endswith("o_proj"):
                made["low rank"].add(site.name, LinearEdit(down=noise(2, site.in_features), up=noise(2, site.out_features)))
        made["scales"].add(f"{layer}.mlp.down_proj", LinearEdit(out_scale=1 + noise(width), shift=noise(width)))
        made["norms"].add(f"{layer}.input_layernorm", NormEdit(weight=1 + noise(width)))
        shape = (3, spec.num_kv_heads, spec.head_dim)
        made["side"].add(f"{layer}.self_attn", SideEdit(noise(*shape), noise(*shape)))
        unit = InterventionEdit(noise(2, width), noise(2), noise(2, width), "relu", positions=4)
        made["intervention"].add(layer, unit)
        made["added"].add(f"{layer}.mlp.down_proj", bottleneck(Placement("silu")))
        parallel = Placement("relu", source="residual", residual="sublayer")
        made["parallel"].add(f"{layer}.self_attn.o_proj", bottleneck(parallel))
        summed = Placement("relu", source="sum", residual="sum", replaces=True)
        for _ in range(2):
            made["fusion"].add(f"{layer}.self_attn.o_proj", bottleneck(Placement("relu", source="sum")))
        made["fusion"].add(
            f"{layer}.self_attn.o_proj",
            FusionEdit(summed, noise(width, width), None, noise(width, width), None, noise(width, width)),
        )
    kv = noise(spec.num_layers, 2, spec.num_kv_heads, 19, spec.head_dim)
    made["prefix"] = Program(prologue=Prologue(kv=kv))
    made["prompt"] = Program(prologue=Prologue(tokens=noise(5, width), tokens_site=spec.embedding))
    return made


COMPOSITIONS: dict[str, dict[str, float]] = {
    "prologue and low rank": {"prefix": 1.0, "low rank": 0.7},
    "two prologues and norms": {"prompt": 1.0, "prefix": 1.0, "norms": -0.5},
    "virtual tokens before an intervention": {"prompt": 1.0, "intervention": 1.0},
    "a prefix before an intervention": {"intervention": 1.0, "prefix": 1.0, "low rank": 0.5},
    "side attention and a bottleneck": {"side": 0.5, "added": 0.7, "norms": 1.0},
    "bottlenecks behind scales and low rank": {"scales": 0.5, "added": -0.6, "low rank": 0.4, "parallel": 1.5},
    "a fusion and a prefix": {"fusion": 1.0, "prefix": 1.0, "low rank": 0.3},
    "nearly all": {"side": 1.0, "prompt": 1.0, "intervention": 1.0, "scales": 0.6, "added": 0.5, "low rank": 0.3, "norms": 0.5},
}


class Reference:
    """Hugging Face's model, with parts acting by hooks as the definition says; one sequence at a time."""

    def __init__(self, directory: Path, spec: BaseSpec, parts: Sequence[Part]) -> None:
        config = AutoConfig.from_pretrained(directory)
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            directory, config=config, dtype=torch.float64, attn_implementation="medley_test_side"
        ).eval()
        self._parts = parts
        self._prologues = [part.program.prologue for part in parts if len(part.program.prologue)]
        self._kept: dict[str, Tensor] = {}
        others = {sublayer.site: sublayer.other for sublayer in spec.sublayers}
        for site in spec.sites:
            module = self._model.get_submodule(site.name)
            if site.kind in ("linear", "norm"):
                module.register_forward_hook(self._linear(site.name, others.get(site.name)))
            elif site.kind == "attention":
                module.test_sides = [(part.weight, edit) for part in parts for edit in part.program.edits.get(site.name, ())]
            elif site.kind == "layer":
                module.register_forward_hook(self._layer(site.name))

    def _edits(self, site: str, *kinds: type) -> list[tuple[float, Any]]:
        return [
            (part.weight, edit) for part in self._parts for edit in part.program.edits.get(site, ()) if isinstance(edit, kinds)
        ]

    def _linear(self, site: str, other: str | None) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            self._kept[site] = args[0]
            total = output + sum(
                (
                    weight * (_edited(edit, module, args[0], output) - output)
                    for weight, edit in self._edits(site, LinearEdit, NormEdit)
                ),
                torch.zeros_like(output),
            )
            streams = Streams(total[0], None if other is None else self._kept[other][0])
            fusions = self._edits(site, FusionEdit)
            children = self._edits(site, BottleneckEdit)
            if fusions:
                # It replaces what the layer adds the residual stream to.
                return (fusion_reference([edit for _, edit in children], fusions[0][1], streams) - streams.get("residual"))[None]
            changes = [weight * (bottleneck_reference(edit, streams) - total[0]) for weight, edit in children]
            return total + sum(changes, torch.zeros_like(total[0]))

        return hook

    def _layer(self, site: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, __: tuple[Tensor], output: Tensor) -> Tensor:
            first = sum(prologue.num_tokens for prologue in self._prologues)
            for _, edit in self._edits(site, InterventionEdit):
                y = output[:, first : first + edit.positions]
                inner = torch.relu(y @ edit.source.T + edit.source_bias) - y @ edit.project.T
                output[:, first : first + edit.positions] = y + inner @ edit.project
            return output

        return hook

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], count: int) -> Tensor:
        """The last ``count`` rows."""
        tokens = [prologue.tokens for prologue in self._prologues if prologue.tokens is not None]
        prefixes = [prologue.kv for prologue in self._prologues if prologue.kv is not None]
        rows = torch.cat([*tokens, self._model.get_input_embeddings()(torch.tensor(ids))])
        kv = torch.cat(prefixes, 3) if prefixes else None
        cache = DynamicCache() if kv is None else DynamicCache([(key[None], value[None]) for key, value in kv])
        start = 0 if kv is None else kv.shape[3]
        positions = torch.arange(start, start + len(rows))[None]
        output = self._model(inputs_embeds=rows[None], position_ids=positions, past_key_values=cache, use_cache=True)
        found: Tensor = output.logits[0, -count:]
        return found


def _edited(edit: Edit, module: Any, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(edit, NormEdit):
        return y / module.weight * edit.weight
    assert isinstance(edit, LinearEdit)
    if edit.down is not None and edit.up is not None:
        return y + x @ edit.down.T @ edit.up
    assert edit.out_scale is not None
    assert edit.shift is not None
    return edit.out_scale * y + edit.shift


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any) -> tuple[Tensor, None]:
    count, length = query.shape[2], key.shape[2]
    visible = torch.ones(count, length, dtype=torch.bool).tril(length - count)
    out = scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scaling, enable_gqa=True)
    for weight, edit in module.test_sides:
        own = [tensor.transpose(0, 1)[None] for tensor in (edit.key, edit.value)]
        out = out + weight * scaled_dot_product_attention(query, *own, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register("medley_test_side", _attend)


@pytest.mark.parametrize("budget", [512, 7])
def test_compositions_equal_their_definition(budget: int, tiny_models: TinyModels, tmp_path: Path) -> None:
    """All of them in one batch with the base, in one piece and in small ones."""
    model = tiny_models("llama")
    base = load_base_for_lowering(model, "float64")
    programs = kinds(base.spec)
    composed = {name: [Part(programs[kind], weight) for kind, weight in chosen.items()] for name, chosen in COMPOSITIONS.items()}
    refs = {name: write(compose(parts, base), f"c{index}", tmp_path) for index, (name, parts) in enumerate(composed.items())}
    requests = [
        greedy(f"{name}:{which}", ids, ref, tokens=6)
        for name, ref in {**refs, "base": BASE}.items()
        for which, ids in PROMPTS.items()
    ]
    engine = make_engine(model, "float64", max_batch_tokens=budget, kv_cache_bytes=16 << 20)
    results = run(engine, requests)
    engine.close()
    references = {name: Reference(model, base.spec, parts) for name, parts in {**composed, "base": []}.items()}
    for request in requests:
        result, reference = results[request.request_id], references[request.request_id.partition(":")[0]]
        assert result.error is None, request.request_id
        expected = reference.logits([*request.prompt_token_ids, *result.tokens][:-1], 6)
        scale = max(1.0, float(expected.abs().max()))
        assert float((torch.stack(result.logits) - expected).abs().max()) <= TOLERANCE * scale, request.request_id
    first = torch.stack([results[f"{name}:long"].logits[0] for name in references])
    assert float((first[:, None] - first[None]).abs().amax(-1).add(torch.eye(len(first))).min()) > 1e-2, "one changes nothing"


def test_weight_one_at_disjoint_sites_is_the_merged_program(tiny_models: TinyModels, tmp_path: Path) -> None:
    model = tiny_models("llama")
    base = load_base_for_lowering(model, "float64")
    parts = [
        program for name, program in kinds(base.spec).items() if name in ("side", "norms", "intervention", "fusion", "prompt")
    ]
    merged = Program()
    for program in parts:
        merged.edits |= program.edits
        merged.prologue = program.prologue if len(program.prologue) else merged.prologue
    composed = compose([Part(program) for program in parts], base)
    engine = make_engine(model, "float64", prefix_caching=False)
    refs = {"composed": write(composed, "composed", tmp_path), "merged": write(merged, "merged", tmp_path)}
    results = run(engine, [greedy(name, PROMPTS["long"], ref) for name, ref in refs.items()])
    engine.close()
    same(results["merged"], results["composed"])
