"""What all AdapterHub checkpoints share: the config around a method's own, how the latter's fields are read, and what a method makes of them.

Knows no method's fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from server.adapters.activations import ACTIVATIONS
from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.method import Rule, no_effect
from server.adapters.lower.source import Source

# A file without a version comes from adapter-transformers, which named activations after an old transformers.
_LEGACY_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}


def _object(value: Any) -> str | None:
    return None if isinstance(value, dict) else "an object"


def _name(value: Any) -> str | None:
    fits = isinstance(value, str) and 0 < len(value) <= 256
    return None if fits else "the adapter's name, which is part of every tensor's key"


ENVELOPE: dict[str, Rule] = {
    "config": _object,
    "name": _name,
    # Keys and shapes say whether it fits the base.
    **dict.fromkeys(("hidden_size", "model_class", "model_name", "model_type", "type", "version"), no_effect),
}
"""Rules for the fields around ``config``."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one config of the library makes: the rules of its fields, and how it is lowered into a program, the checked fields given."""

    fields: Mapping[str, Rule]
    lower: Callable[[Source, Base, Program, Mapping[str, Any]], None]


def options(source: Source, values: Any, rules: Mapping[str, Rule], prefix: str = "config.") -> dict[str, Any]:
    """A method's own fields, checked. Raises LoweringError with all of them that are not served."""
    if not isinstance(values, Mapping):
        source.fault("unsupported_field", f"{source.file}: {prefix[:-1]}", "must be an object", found=repr(values)[:40])
        values = {}
    source.check_fields(rules, values, prefix)
    source.stop_if_faulty()
    return dict(values)


def one_config(part: Part) -> Callable[[Source, Base], Program]:
    """The lowering of a checkpoint whose ``config`` is that of one part."""

    def lower(source: Source, base: Base) -> Program:
        program = Program()
        part.lower(source, base, program, options(source, source.config.get("config"), part.fields))
        return program

    return lower


def activation(source: Source, name: str) -> str:
    """An activation as the library means it."""
    return name.lower() if "version" in source.config else _LEGACY_ACTIVATIONS.get(name, name).lower()


def activation_name(value: Any) -> str | None:
    """Rule: the name of an activation that is known here, by whatever version of the library."""
    known = isinstance(value, str) and (value.lower() in ACTIVATIONS or value in _LEGACY_ACTIVATIONS)
    return None if known else f"one of {', '.join(sorted(ACTIVATIONS))}"


def before_1_1(source: Source) -> bool:
    """Whether the library was older than 1.1.0 (adapter-transformers does not count)."""
    version = str(source.config.get("version", ""))
    major, _, rest = version.removeprefix("adapters.").partition(".")
    minor = rest.partition(".")[0]
    known = version.startswith("adapters.") and major.isascii() and major.isdigit() and minor.isascii() and minor.isdigit()
    return known and (int(major[:9]), int(minor[:9])) < (1, 1)
