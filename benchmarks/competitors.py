"""Who takes part: Medley and transformers always, the peers where their environments are."""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.contest import Competitor
from benchmarks.engines.remote import ROOT
from benchmarks.work import BASE, LONG_PROMPT, SINGLE, W1, W1_VARIANTS, ZIPF_SLOTS, ZIPFIAN

OWN = Path(sys.executable)


def environment(engine: str) -> Path:
    """The interpreter of a peer's environment."""
    return ROOT / f".venv-bench-{engine}" / "bin" / "python"


def at_home() -> list[Competitor]:
    """What ``make bench`` measures."""
    alone = {W1.name: (BASE, SINGLE)}
    return [
        Competitor("medley", "medley_http", OWN, {W1.name: W1_VARIANTS}, twice=True),
        Competitor("transformers-sdpa", "transformers_peft", OWN, alone, {"attention": "sdpa"}),
        Competitor("transformers-eager", "transformers_peft", OWN, alone, {"attention": "eager"}),
        Competitor("peft", "transformers_peft", OWN, {W1.name: ("1", "8", "32")}, {"attention": "sdpa"}, once=True),
    ]


def with_peers(adapter_bytes: int) -> list[Competitor]:
    """What ``make bench-peers`` measures. ``adapter_bytes``: what one takes in the bank, which bounds the one of Zipf's workload."""
    mixed = ("1", "8", "32")
    alone = {W1.name: (BASE, SINGLE), LONG_PROMPT.name: (BASE,)}
    everything = {W1.name: (BASE, *mixed, SINGLE), LONG_PROMPT.name: LONG_PROMPT.variants}
    vllm, llama, openvino = environment("vllm_cpu"), OWN, environment("openvino_genai")
    room = {"bank_bytes": ZIPF_SLOTS * adapter_bytes}
    return [
        Competitor("medley", "medley_http", OWN, {W1.name: W1_VARIANTS, LONG_PROMPT.name: LONG_PROMPT.variants}, twice=True),
        Competitor("medley", "medley_http", OWN, {ZIPFIAN.name: ZIPFIAN.variants}, room, twice=True),
        Competitor("medley-engine", "medley_engine", OWN, {W1.name: (BASE, "8", "32", SINGLE)}),
        Competitor("transformers-sdpa", "transformers_peft", OWN, alone, {"attention": "sdpa"}),
        Competitor("transformers-eager", "transformers_peft", OWN, {W1.name: (BASE, SINGLE)}, {"attention": "eager"}),
        Competitor("peft", "transformers_peft", OWN, {W1.name: mixed}, {"attention": "sdpa"}, once=True),
        # Adapters that are enabled cost vLLM's base a quarter, so that its base is measured without them.
        Competitor("vllm", "vllm_cpu", vllm, alone),
        Competitor("vllm", "vllm_cpu", vllm, {W1.name: mixed, LONG_PROMPT.name: ("32",)}, {"lora": True}, once=True),
        Competitor("llama.cpp", "llama_cpp", llama, everything, once=True),
        Competitor("openvino", "openvino_genai", openvino, everything, once=True),
    ]
