"""Several AdapterHub configs in one adapter, such as Mix-and-Match (He et al. 2021): a prefix and parallel bottlenecks.

Each config finds its own tensors. UniPELT's are gated, and each of them refuses that.
"""

from __future__ import annotations

from typing import Any

from server.adapters.ir import Program
from server.adapters.lower.adapterhub.bottleneck import BOTTLENECKS
from server.adapters.lower.adapterhub.lora import LORAS
from server.adapters.lower.adapterhub.options import ENVELOPE, options
from server.adapters.lower.adapterhub.prefix import PREFIX
from server.adapters.lower.base import Base
from server.adapters.lower.method import Method, only
from server.adapters.lower.source import Source

_PARTS = {"bottleneck": BOTTLENECKS, "lora": LORAS, "prefix_tuning": PREFIX}


def _configs(value: Any) -> str | None:
    fits = isinstance(value, list) and 0 < len(value) <= 8 and all(isinstance(item, dict) for item in value)
    return None if fits else "a list of up to 8 configs"


def lower(source: Source, base: Base) -> Program:
    """Every config of the union in turn, into one program."""
    program = Program()
    configs = options(source, source.config.get("config"), {"architecture": only("union"), "configs": _configs}).get(
        "configs", []
    )
    names = [str(item.get("architecture") or "bottleneck") for item in configs]
    for index, name in enumerate(names):
        if name not in _PARTS or name in names[:index]:
            message = f"a union may have one config of each of {', '.join(_PARTS)}"
            where = f"{source.file}: config.configs.{index}.architecture"
            source.fault("unsupported_field", where, message, found=name[:80])
    source.stop_if_faulty()
    for index, (name, values) in enumerate(zip(names, configs, strict=True)):
        part = _PARTS[name]
        part.lower(source, base, program, options(source, values, part.fields, f"config.configs.{index}."))
    return program


METHOD = Method(
    name="union",
    summary="its configs one by one: prefix, bottlenecks, low rank (Mix-and-Match)",
    fields=ENVELOPE,
    lower=lower,
)
