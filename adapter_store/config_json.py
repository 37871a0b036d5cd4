"""Strict reading of an adapter's JSON config. What its fields mean is the lowering's business."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapter_store.errors import Fault

MAX_BYTES = 256 << 10
MAX_DEPTH = 32
# Keys that make libraries import code or open files by a tenant's word; harmless only when they say nothing.
_CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_code"})


class ConfigFault(Exception):
    """The config is not one that will be read. Carries the fault."""

    def __init__(self, message: str, where: str = "adapter_config.json", found: str | None = None) -> None:
        super().__init__(message)
        self.fault = Fault("invalid_config", where, message, None, found)


def read_config(path: Path) -> dict[str, Any]:
    """The config as a JSON object, or ConfigFault."""
    if path.stat().st_size > MAX_BYTES:
        raise ConfigFault(f"the config is larger than {MAX_BYTES} bytes", found=f"{path.stat().st_size} bytes")
    try:
        text = path.read_bytes().decode("utf-8")
        _check_depth(text)
        config = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigFault(f"the config is not JSON in UTF-8: {error}"[:200]) from error
    except ValueError as error:
        raise ConfigFault(f"a number in the config cannot be read: {error}"[:200]) from error
    if not isinstance(config, dict):
        raise ConfigFault("the config must be a JSON object", found=type(config).__name__)
    for key in sorted(_CODE_KEYS & config.keys()):
        if config[key]:
            raise ConfigFault("the server runs no code that an adapter names; remove this field", f"adapter_config.json: {key}")
    return config


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        keys = [key for key, _ in items]
        raise ConfigFault("the config names a key twice", found=next(key for key in keys if keys.count(key) > 1)[:80])
    return found


def _no_constant(name: str) -> Any:
    raise ConfigFault("NaN and infinity are not JSON", found=name)


def _check_depth(text: str) -> None:
    """Refuse deep nesting before the parser recurses into it. Brackets inside strings do not count."""
    depth, in_string, escaped = 0, False, False
    for char in text:
        if in_string:
            in_string = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            in_string, escaped = True, False
        elif char in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise ConfigFault(f"the config is nested deeper than {MAX_DEPTH} levels")
        elif char in "]}":
            depth -= 1
