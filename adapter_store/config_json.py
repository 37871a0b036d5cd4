"""Strict reading of an adapter's JSON files. What its fields mean is the lowering's business."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adapter_store.errors import Fault

MAX_BYTES = 256 << 10
MAX_DEPTH = 32
MAX_LABEL = 256
# Keys that make libraries import code or open files by a tenant's word; harmless only when they say nothing.
_CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "custom_code"})


class ConfigFault(Exception):
    """The config is not one that will be read. Carries the fault."""

    def __init__(self, message: str, where: str = "", found: str | None = None) -> None:
        super().__init__(message)
        self.fault = Fault("invalid_config", where, message, None, found)


def read_config(path: Path, label: str = "adapter_config.json") -> dict[str, Any]:
    """The config as a JSON object, or ConfigFault. ``label`` is the name to use in messages."""
    config = _read(path, label)
    if not isinstance(config, dict):
        raise ConfigFault("the config must be a JSON object", label, type(config).__name__)
    for key in sorted(_CODE_KEYS & config.keys()):
        if config[key]:
            raise ConfigFault("the server runs no code that an adapter names; remove this field", f"{label}: {key}")
    return config


def read_labels(path: Path, label: str) -> tuple[str, ...]:
    """The names of a classifier's outputs, in order, or ConfigFault."""
    names = _read(path, label)
    if (
        not isinstance(names, list)
        or not names
        or not all(isinstance(name, str) and 0 < len(name) <= MAX_LABEL for name in names)
    ):
        raise ConfigFault(
            f"must be a list of at least one string, each of 1 to {MAX_LABEL} characters",
            label,
            f"{type(names).__name__}: {names!r}"[:80],
        )
    if unprintable := [name for name in names if not name.isprintable()]:
        raise ConfigFault("labels are shown on terminals; leave control characters out", label, repr(unprintable[0])[:80])
    if len(set(names)) != len(names):
        raise ConfigFault("two outputs have the same name", label)
    return tuple(names)


def _check_text(value: Any) -> None:
    """Raises ConfigFault for half of a surrogate pair anywhere in a JSON value: JSON can spell it, but it is no text and has no UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConfigFault("a text in the file holds half of a surrogate pair", found=ascii(error.object[error.start])) from error


def _read(path: Path, label: str) -> Any:
    if path.stat().st_size > MAX_BYTES:
        raise ConfigFault(f"the file is larger than {MAX_BYTES} bytes", label, f"{path.stat().st_size} bytes")
    try:
        text = path.read_bytes().decode("utf-8")
        _check_depth(text)
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        _check_text(value)
        return value
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigFault(f"the file is not JSON in UTF-8: {error}"[:200], label) from error
    except ValueError as error:
        raise ConfigFault("a number in the file has more digits than are read", label) from error
    except ConfigFault as fault:
        raise ConfigFault(str(fault), label, fault.fault.found) from None


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(items)
    if len(found) != len(items):
        keys = [key for key, _ in items]
        raise ConfigFault("the file names a key twice", found=next(key for key in keys if keys.count(key) > 1)[:80])
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
                raise ConfigFault(f"the file is nested deeper than {MAX_DEPTH} levels")
        elif char in "]}":
            depth -= 1
