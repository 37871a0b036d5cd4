"""What a lowering declares about its method, and the rules by which config fields are checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from server.adapters.ir import Program
from server.adapters.lower.base import Base
from server.adapters.lower.source import Source

Rule = Callable[[Any], str | None]
"""Returns what was expected when a field's value is not acceptable, else None."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method by its name in checkpoints, what it reduces to (for docs/PEFT.md), the rules of its config fields and its lowering.

    The name is PEFT's ``peft_type``, AdapterHub's architecture, or ``medley_type``. ``file`` is what the config's file is called.
    """

    name: str
    summary: str
    fields: Mapping[str, Rule]
    lower: Callable[[Source, Base], Program]
    file: str = "adapter_config.json"


def no_effect(_: Any) -> str | None:
    """A field that changes nothing at inference: any value."""
    return None


def only(*allowed: Any) -> Rule:
    """A field that must keep one of these values; empty containers count as None."""

    def rule(value: Any) -> str | None:
        value = None if isinstance(value, list | dict | str) and not value else value
        same = any(type(value) is type(item) and value == item for item in allowed)
        return None if same else " or ".join(repr(item) for item in allowed)

    return rule


def boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def number(low: float, high: float) -> Rule:
    """A finite number in ``[low, high]``."""

    def rule(value: Any) -> str | None:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
        return None if fits else f"a number from {low:g} to {high:g}"

    return rule


def integer(low: int, high: int) -> Rule:
    """An integer in ``[low, high]``."""

    def rule(value: Any) -> str | None:
        return None if type(value) is int and low <= value <= high else f"an integer from {low} to {high}"

    return rule


def optional(rule: Rule) -> Rule:
    """The rule, or null."""
    return lambda value: None if value is None else rule(value)


def token_ids(value: Any) -> str | None:
    """A list of token ids, of bounded length."""
    fits = isinstance(value, list) and len(value) <= 65536 and all(type(item) is int and item >= 0 for item in value)
    return None if fits else "a list of token ids"


# What every PEFT config carries and what says nothing about the maths.
COMMON_FIELDS: dict[str, Rule] = dict.fromkeys(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    ),
    no_effect,
)
