"""transformers' ``generate`` on one batch; with adapters, PEFT's mixed batches (``adapter_names``). Option ``attention``: eager or sdpa."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, logging

from benchmarks.engines.protocol import Engine, Setup, drive
from benchmarks.work import Job


class TransformersPeft(Engine):
    """Plain transformers without adapters; with them a PeftModel that holds them all."""

    def __init__(self, setup: Setup) -> None:
        warnings.simplefilter("ignore")
        quiet: Any = logging
        quiet.set_verbosity_error()
        quiet.disable_progress_bar()
        attention = setup.options.get("attention", "sdpa")
        loaded: Any = AutoModelForCausalLM
        dtype = getattr(torch, setup.dtype)
        self._model: Any = loaded.from_pretrained(setup.base, dtype=dtype, attn_implementation=attention).eval()
        self._names = {adapter: Path(adapter).name for adapter in setup.adapters}
        for adapter, name in self._names.items():
            if isinstance(self._model, PeftModel):
                self._model.load_adapter(adapter, adapter_name=name)
            else:
                self._model = PeftModel.from_pretrained(self._model, adapter, adapter_name=name).eval()

    @torch.inference_mode()
    def run(self, job: Job) -> float:
        ids = torch.tensor(job.prompts)
        extra = {}
        if any(job.adapters):
            extra["adapter_names"] = [self._names[adapter] if adapter else "__base__" for adapter in job.adapters]
        started = time.perf_counter()
        made = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=job.new_tokens,
            max_new_tokens=job.new_tokens,
            do_sample=False,
            pad_token_id=0,
            **extra,
        )
        seconds = time.perf_counter() - started
        if made.shape[1] - ids.shape[1] != job.new_tokens:
            raise RuntimeError(f"made {made.shape[1] - ids.shape[1]} tokens a row, not {job.new_tokens}")
        return seconds


if __name__ == "__main__":
    drive(TransformersPeft)
