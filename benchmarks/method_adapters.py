"""Random adapters of many methods for the benchmark, as their libraries would save them. Small values: nothing overflows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

RANK, VIRTUAL_TOKENS, BOTTLENECK = 16, 16, 36


@dataclass(frozen=True)
class Shapes:
    """Widths of a Llama base, by the names of its linears."""

    hidden: int
    layers: int
    kv: int
    linears: Mapping[str, tuple[int, int]]

    @classmethod
    def read(cls, base: Path) -> Shapes:
        config: dict[str, Any] = json.loads((base / "config.json").read_text())
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
        linears = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden, kv),
            "self_attn.v_proj": (hidden, kv),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (hidden, inner),
            "mlp.up_proj": (hidden, inner),
            "mlp.down_proj": (inner, hidden),
        }
        return cls(hidden, config["num_hidden_layers"], kv, linears)


class Random:
    """Tensors of one adapter, by its number."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def around(self, centre: float, *shape: int) -> Tensor:
        return centre + 0.02 * torch.randn(*shape, generator=self._generator)

    def __call__(self, *shape: int) -> Tensor:
        return self.around(0.0, *shape)


Files = tuple[dict[str, Any], dict[str, Tensor], str]
"""Config, tensors, and the name of the weights file."""


def _peft(kind: str, tensors: dict[str, Tensor], **settings: Any) -> Files:
    return {"peft_type": kind, "task_type": "CAUSAL_LM", **settings}, tensors, "adapter_model.safetensors"


def _each(shapes: Shapes, make: Callable[[int, int], dict[str, Tensor]], names: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """``make(in, out)`` for every linear (of these names) of every layer, by PEFT's keys."""
    return {
        f"base_model.model.model.layers.{layer}.{name}.{tail}": tensor
        for layer in range(shapes.layers)
        for name, sizes in shapes.linears.items()
        if not names or name in names
        for tail, tensor in make(*sizes).items()
    }


def lora(shapes: Shapes, r: Random, rank: int = RANK) -> Files:
    tensors = _each(shapes, lambda i, o: {"lora_A.weight": r(rank, i), "lora_B.weight": r(o, rank)})
    # PEFT itself, which is measured too, goes by the names.
    targets = sorted({name.rpartition(".")[2] for name in shapes.linears})
    return _peft("LORA", tensors, r=rank, lora_alpha=rank, bias="none", target_modules=targets)


def dora(shapes: Shapes, r: Random) -> Files:
    def make(i: int, o: int) -> dict[str, Tensor]:
        return {"lora_A.weight": r(RANK, i), "lora_B.weight": r(o, RANK), "lora_magnitude_vector": r.around(1.0, o).abs()}

    return _peft("LORA", _each(shapes, make), r=RANK, lora_alpha=RANK, bias="none", use_dora=True)


def ia3(shapes: Shapes, r: Random) -> Files:
    tensors = _each(shapes, lambda _, o: {"ia3_l": r.around(1.0, o, 1)}, ("self_attn.k_proj", "self_attn.v_proj"))
    tensors |= _each(shapes, lambda i, _: {"ia3_l": r.around(1.0, 1, i)}, ("mlp.down_proj",))
    return _peft("IA3", tensors, feedforward_modules=["down_proj"])


def vera(shapes: Shapes, r: Random) -> Files:
    sizes = [size for pair in shapes.linears.values() for size in pair]
    tensors = _each(shapes, lambda _, o: {"vera_lambda_b": r(o), "vera_lambda_d": r.around(0.1, RANK)})
    tensors |= {"base_model.vera_A": r(RANK, max(sizes)), "base_model.vera_B": r(max(sizes), RANK)}
    return _peft("VERA", tensors, r=RANK, save_projection=True)


def oft(shapes: Shapes, r: Random) -> Files:
    block = 32
    tensors = _each(shapes, lambda i, _: {"oft_R.weight": r(i // block, block * (block - 1) // 2)})
    return _peft("OFT", tensors, r=0, oft_block_size=block)


def road(shapes: Shapes, r: Random) -> Files:
    tensors = _each(shapes, lambda _, o: {"road_theta": r(o // 2), "road_alpha": r.around(1.0, o // 2)})
    return _peft("ROAD", tensors, variant="road_1", group_size=64)


def norms(shapes: Shapes, r: Random) -> Files:
    tensors = {
        f"base_model.model.model.layers.{layer}.{name}.ln_tuning_layers.weight": r.around(1.0, shapes.hidden)
        for layer in range(shapes.layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    return _peft("LN_TUNING", tensors)


def prompt(shapes: Shapes, r: Random) -> Files:
    tensors = {"prompt_embeddings": r(VIRTUAL_TOKENS, shapes.hidden)}
    return _peft("PROMPT_TUNING", tensors, num_virtual_tokens=VIRTUAL_TOKENS, token_dim=shapes.hidden, num_layers=shapes.layers)


def prefix(shapes: Shapes, r: Random) -> Files:
    tensors = {"prompt_embeddings": r(VIRTUAL_TOKENS, 2 * shapes.layers * shapes.kv)}
    return _peft("PREFIX_TUNING", tensors, num_virtual_tokens=VIRTUAL_TOKENS, token_dim=shapes.kv, num_layers=shapes.layers)


def bitfit(shapes: Shapes, r: Random) -> Files:
    tensors = {
        f"model.layers.{layer}.{name}.bias": r(sizes[1])
        for layer in range(shapes.layers)
        for name, sizes in shapes.linears.items()
    }
    return {"medley_type": "BITFIT"}, tensors, "adapter_model.safetensors"


def _bottleneck(shapes: Shapes, r: Random, sites: tuple[str, ...], activation: str, **flags: Any) -> Files:
    tensors = {}
    for layer in range(shapes.layers):
        for site in sites:
            key = f"model.layers.{layer}.{site}.adapters.bench"
            tensors[f"{key}.adapter_down.0.weight"] = r(BOTTLENECK, shapes.hidden)
            tensors[f"{key}.adapter_down.0.bias"] = r(BOTTLENECK)
            tensors[f"{key}.adapter_up.weight"] = r(shapes.hidden, BOTTLENECK)
            tensors[f"{key}.adapter_up.bias"] = r(shapes.hidden)
    config = {
        "mh_adapter": len(sites) > 1,
        "output_adapter": True,
        "non_linearity": activation,
        "reduction_factor": shapes.hidden // BOTTLENECK,
        "original_ln_after": True,
        "residual_before_ln": True,
        "adapter_residual_before_ln": False,
        "scaling": 1.0,
        **flags,
    }
    facts = {"model_type": "llama", "model_class": "LlamaForCausalLM", "hidden_size": shapes.hidden}
    return {"config": config, "name": "bench", "version": "adapters.1.3.0", **facts}, tensors, "adapter.safetensors"


def houlsby(shapes: Shapes, r: Random) -> Files:
    return _bottleneck(shapes, r, ("attention_adapters", "output_adapters"), "swish", original_ln_before=False)


def pfeiffer(shapes: Shapes, r: Random) -> Files:
    return _bottleneck(shapes, r, ("output_adapters",), "relu", original_ln_before=True)


METHODS: dict[str, Callable[[Shapes, Random], Files]] = {
    "LoRA": lora,
    "DoRA": dora,
    "IA3": ia3,
    "VeRA": vera,
    "OFT": oft,
    "RoAd": road,
    "norm tuning": norms,
    "BitFit": bitfit,
    "prompt tuning": prompt,
    "prefix tuning": prefix,
    "Houlsby": houlsby,
    "Pfeiffer": pfeiffer,
}


def write_method(
    method: str, base: Path, directory: Path, count: int, *, name: str = "", rank: int = RANK, first: int = 0
) -> list[Path]:
    """``count`` adapters of one method as directories to push, ``NAME-0`` and on (or from ``first``), weights in bfloat16. ``rank``: LoRA's."""
    shapes, made = Shapes.read(base), []
    for number in range(first, first + count):
        random = Random(number)
        config, tensors, weights = lora(shapes, random, rank) if method == "LoRA" else METHODS[method](shapes, random)
        path = directory / f"{name or slug(method)}-{number}"
        path.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.bfloat16().contiguous() for key, tensor in tensors.items()}, path / weights)
        (path / "adapter_config.json").write_text(json.dumps(config))
        made.append(path)
    return made


def slug(method: str) -> str:
    """A method's name as adapters' names begin with it."""
    return method.lower().replace(" ", "-")
