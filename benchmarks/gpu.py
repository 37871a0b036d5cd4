"""Decode steps on a GPU beside what its memory allows: random weights in the shape of Llama 3 8B, 64 distinct adapters of ranks 8–64.

``python -m benchmarks.gpu`` needs torch, transformers and triton alone. One step packs a batch and runs it, for 1–256 sequences of one
length: plain, and with every row's adapter another one as far as there are some. The limit is the time in which the memory can read once
what the step must read: the base's weights, the sequences' keys and values, and the weights of the adapters in the step. Bandwidth is
measured in the same run. Decode steps are recorded and replayed unless ``--eager`` says not to. Writes ``benchmarks/out/gpu.json``. ``--tiny``
tries the program out on any machine; its figures mean nothing, and it writes none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from server.adapters.bank import Bank
from server.adapters.base_spec import BaseSpec, describe
from server.adapters.ir import LinearEdit, Program
from server.adapters.packed import pack_program
from server.engine import attention
from server.engine.batch import pack
from server.engine.graphs import AFTER, GraphLimits
from server.engine.kernels.choice import choose_kernels
from server.engine.kv_cache import KVCache
from server.engine.model import BaseModel
from server.engine.runner import Runner
from server.engine.scheduler import Scheduled
from server.engine.sequence import Sequence
from server.engine.types import Request, SamplingParams

OUT = Path(__file__).parent / "out"
BLOCK = 16
RANKS = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Size:
    """What is measured."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    adapters: int
    rows: tuple[int, ...]
    repeats: int


LLAMA_3_8B = Size(4096, 14336, 32, 32, 8, 128256, 512, 64, (1, 2, 4, 8, 16, 32, 64, 128, 256), 20)
TINY = Size(64, 128, 2, 4, 2, 512, 40, 6, (1, 4, 8), 3)


@dataclass(frozen=True, slots=True)
class Row:
    """One batch size: milliseconds a step, and the share of the time that the memory's speed alone would need."""

    rows: int
    adapters: int
    base_ms: float
    adapters_ms: float
    ratio_to_base: float
    base_share_of_limit: float
    adapters_share_of_limit: float


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure decode steps on a GPU.")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape in fp32, on the CPU where there is no GPU")
    parser.add_argument("--eager", action="store_true", help="launch every kernel of every step, instead of replaying recordings")
    arguments = parser.parse_args()
    size = TINY if arguments.tiny else LLAMA_3_8B
    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny tries the program out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    torch.manual_seed(0)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    speed = bandwidth(device, 1 << (24 if arguments.tiny else 31))
    print(f"{name}, {dtype}, {speed / 1e9:.0f} GB/s measured by a copy")
    rows = measure(size, dtype, device, speed, records=not arguments.eager)
    if arguments.tiny:
        return 0
    OUT.mkdir(exist_ok=True)
    found = {
        "device": name,
        "torch": torch.__version__,
        "bandwidth_gb_per_s": speed / 1e9,
        "recorded": not arguments.eager,
        "rows": [asdict(row) for row in rows],
    }
    (OUT / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
    return 0


@torch.inference_mode()
def measure(size: Size, dtype: torch.dtype, device: torch.device, speed: float, *, records: bool) -> list[Row]:
    """Every batch size. ``speed`` in bytes a second; ``records``: decode steps are recorded where the device can."""
    base = make_base(size, dtype, device)
    bank = Bank(base.spec, capacity_bytes=bank_bytes(size, base.spec, dtype), max_slots=size.adapters, dtype=dtype, device=device)
    for index in range(size.adapters):
        program = random_program(base.spec, RANKS[index % len(RANKS)], dtype, device)
        bank.admit(pack_program(program, program_id=str(index)))
    blocks = -(-size.context // BLOCK)
    limits = GraphLimits(max(size.rows), blocks, BLOCK, spare_block=max(size.rows) * blocks + 1)
    cache = KVCache(
        num_layers=size.layers,
        num_blocks=limits.spare_block + 1,
        block_size=BLOCK,
        kv_heads=size.kv_heads,
        head_dim=base.head_dim,
        dtype=dtype,
        device=device,
    )
    kernels = choose_kernels("", dtype, device)
    graphs = (kernels.make_graph, limits) if kernels.make_graph is not None and records else None
    runner = Runner(base, cache, bank, kernel=kernels.edits, attention=kernels.attention, graphs=graphs)
    weights = sum(item.nbytes for item in base.model.parameters()) - base.model.get_input_embeddings().weight.nbytes
    block_bytes = KVCache.block_bytes(size.layers, BLOCK, size.kv_heads, base.head_dim, dtype)
    found = []
    for count in size.rows:
        times, needed = [], []
        for adapters in (0, min(count, size.adapters)):
            slots = [bank.resident(1 + index % adapters) if adapters else None for index in range(count)]
            sequences = [make_sequence(index, size, held.slot if held else 0, blocks) for index, held in enumerate(slots)]
            work = [Scheduled(sequence, size.context - 1, 1) for sequence in sequences]
            times.append(timed(lambda work=work: runner.run(pack(work, BLOCK, device)), size.repeats, device))
            distinct = {held.slot: held.num_rows * dtype.itemsize for held in slots if held}
            needed.append((weights + count * blocks * block_bytes + sum(distinct.values())) / speed)
        (plain, mixed), (plain_limit, mixed_limit) = times, needed
        row = Row(count, adapters, plain * 1e3, mixed * 1e3, plain / mixed, plain_limit / plain, mixed_limit / mixed)
        print(
            f"{row.rows:4} rows: base {row.base_ms:8.2f} ms ({row.base_share_of_limit:4.0%} of the limit), {row.adapters:3} adapters "
            f"{row.adapters_ms:8.2f} ms ({row.adapters_share_of_limit:4.0%}), {row.ratio_to_base:.2f} of the base's pace"
        )
        found.append(row)
    return found


def make_base(size: Size, dtype: torch.dtype, device: torch.device) -> BaseModel:
    """A model of random weights."""
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocab,
        max_position_embeddings=8192,
    )
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    model.requires_grad_(False).eval()
    spec = describe(model, "0" * 64, str(dtype).removeprefix("torch."))
    return BaseModel(
        model=model,
        spec=spec,
        num_layers=spec.num_layers,
        kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_positions=spec.max_positions,
        eos_token_ids=(),
        final_softcap=None,
        embedding="",
    )


def random_program(spec: BaseSpec, rank: int, dtype: torch.dtype, device: torch.device) -> Program:
    """A low-rank edit on every linear of the layers."""
    program = Program()
    for site in spec.sites:
        if site.kind == "linear":
            down = torch.randn(rank, site.in_features, dtype=dtype, device=device) / site.in_features
            up = torch.randn(rank, site.out_features, dtype=dtype, device=device)
            program.add(site.name, LinearEdit(down=down, up=up))
    return program


def bank_bytes(size: Size, spec: BaseSpec, dtype: torch.dtype) -> int:
    """Room for all adapters, rounding included."""
    widths = sum(site.in_features + site.out_features for site in spec.sites if site.kind == "linear")
    ranks = sum(RANKS[index % len(RANKS)] for index in range(size.adapters))
    return int((ranks * widths * 1.1 + size.adapters * (2 << 20)) * dtype.itemsize)


def make_sequence(index: int, size: Size, slot: int, blocks: int) -> Sequence:
    """A sequence that lacks its last token's step. Its blocks hold zeros, which take as long to read as anything else."""
    prompt = tuple((index * 31 + token * 7) % size.vocab for token in range(size.context))
    sequence = Sequence(Request(str(index), prompt, SamplingParams()), index)
    sequence.slot = slot
    sequence.block_table = list(range(1 + index * blocks, 1 + (index + 1) * blocks))
    return sequence


def bandwidth(device: torch.device, nbytes: int) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / timed(lambda: target.copy_(source), 10, device)


def timed(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """The median of several calls in seconds, the device's work included, after those before which nothing is recorded."""
    seconds = []
    for _ in range(repeats + AFTER + 2):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[AFTER + 2 :])


if __name__ == "__main__":
    raise SystemExit(main())
