"""vLLM's CPU build, its engine in process. Option ``lora``: whether adapters are enabled, which costs the base pace."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from benchmarks.engines.protocol import Engine, Setup, drive
from benchmarks.work import Job


class VllmCpu(Engine):
    """All requests of a job at once, no prefix cache."""

    def __init__(self, setup: Setup) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # By itself it keeps a core for its scheduler, which is half of a machine with two.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self._requests = {
            adapter: LoRARequest(Path(adapter).name, number, adapter) for number, adapter in enumerate(setup.adapters, 1)
        }
        lora: dict[str, Any] = {}
        if setup.options.get("lora"):
            lora = {"enable_lora": True, "max_loras": 32, "max_cpu_loras": max(32, len(setup.adapters)), "max_lora_rank": 16}
        self._llm = LLM(
            setup.base,
            dtype=setup.dtype,
            max_model_len=1024,
            max_num_seqs=64,
            enable_prefix_caching=False,
            disable_log_stats=True,
            **lora,
        )

    def run(self, job: Job) -> float:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=job.new_tokens, ignore_eos=True, detokenize=False)
        work: Any = [{"prompt_token_ids": list(prompt)} for prompt in job.prompts]
        adapters = [self._requests[adapter] if adapter else None for adapter in job.adapters]
        started = time.perf_counter()
        found = self._llm.generate(work, params, lora_request=adapters if any(adapters) else None, use_tqdm=False)
        seconds = time.perf_counter() - started
        if any(len(item.outputs[0].token_ids) != job.new_tokens for item in found):
            raise RuntimeError("a request ended early")
        return seconds


if __name__ == "__main__":
    drive(VllmCpu)
