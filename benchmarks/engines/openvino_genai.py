"""OpenVINO GenAI's continuous batching. It applies one set of adapters to all rows, so that adapters take turns, each with its own requests."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.engines.protocol import Engine, Setup, drive
from benchmarks.work import Job


class OpenVinoGenai(Engine):
    """Needs the base converted by optimum-intel, which happens once; adapters are read as they are."""

    def __init__(self, setup: Setup) -> None:
        import openvino_genai as genai

        directory = Path(setup.cache) / f"openvino-{setup.base_digest[:8]}"
        if not (directory / "openvino_model.xml").exists():
            command = [str(Path(sys.executable).with_name("optimum-cli")), "export", "openvino", "--model", setup.base]
            command += ["--task", "text-generation-with-past", "--weight-format", "fp32", str(directory)]
            subprocess.run(command, check=True, stdout=2, stderr=2)
        self._genai = genai
        self._adapters = {adapter: genai.Adapter(str(Path(adapter) / "adapter_model.safetensors")) for adapter in setup.adapters}
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = 2048
        scheduler.enable_prefix_caching = False
        scheduler.dynamic_split_fuse = True
        precision = {"bfloat16": "bf16", "float32": "f32"}[setup.dtype]
        properties: dict[str, object] = {"INFERENCE_PRECISION_HINT": precision}
        if self._adapters:
            config = genai.AdapterConfig()
            for adapter in self._adapters.values():
                config.add(adapter)
            properties["adapters"] = config
        self._pipeline = genai.ContinuousBatchingPipeline(str(directory), scheduler, "CPU", properties)

    def run(self, job: Job) -> float:
        import numpy as np
        import openvino as ov

        groups: dict[str | None, list[int]] = {}
        for index, adapter in enumerate(job.adapters):
            groups.setdefault(adapter, []).append(index)
        prompts = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in job.prompts]
        made = 0
        started = time.perf_counter()
        for adapter, indices in groups.items():
            results = self._pipeline.generate(
                [prompts[index] for index in indices], [self._settings(adapter, job)] * len(indices)
            )
            made += sum(len(result.m_generation_ids[0]) for result in results)
        seconds = time.perf_counter() - started
        if made != job.made:
            raise RuntimeError(f"made {made} tokens, not {job.made}")
        return seconds

    def _settings(self, adapter: str | None, job: Job) -> object:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = job.new_tokens
        config.ignore_eos = True
        config.do_sample = False
        if self._adapters:
            config.adapters = (
                self._genai.AdapterConfig() if adapter is None else self._genai.AdapterConfig(self._adapters[adapter])
            )
        return config


if __name__ == "__main__":
    drive(OpenVinoGenai)
