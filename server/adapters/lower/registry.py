"""The methods that are served, found in the packages of the libraries that write them, and those that are refused by name.

A module that defines ``METHOD`` is a method; nothing else registers it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from functools import cache

from server.adapters.faults import Fault, LoweringError
from server.adapters.lower import adapterhub, medley, peft
from server.adapters.lower.checkpoint import Checkpoint
from server.adapters.lower.method import Method

_PACKAGES = {"peft": peft, "adapters": adapterhub, "medley": medley}
_NAME_FIELDS = {"peft": "peft_type", "adapters": "config.architecture", "medley": "medley_type"}
"""Both by the library, as ``Checkpoint.library`` names it."""

REFUSED = {
    "XLORA": "its gates mix adapters by each token's hidden states in two passes",
    "LILY": "its router averages over all tokens of the batch, so that a neighbour would change the result",
    "PSOFT": "it rotates singular vectors of the base that are not stored, and whose signs differ from machine to machine",
    "SHADOW": "it runs a second model beside the base",
    "ADAMSS": "its segments are not stored in the checkpoint",
}
"""Methods of PEFT that no program can express, with the reason."""


@cache
def methods() -> Mapping[tuple[str, str], Method]:
    """Every method by (library, its name there)."""
    found: dict[tuple[str, str], Method] = {}
    for library, package in _PACKAGES.items():
        for info in pkgutil.iter_modules(package.__path__):
            method = getattr(importlib.import_module(f"{package.__name__}.{info.name}"), "METHOD", None)
            if isinstance(method, Method):
                found[library, method.name] = method
    return found


def method_of(checkpoint: Checkpoint) -> Method:
    """The method that wrote a checkpoint. Raises LoweringError when it is not served, with the reason."""
    library = checkpoint.library or "peft"
    name, known = _name(checkpoint), methods()
    if (library, name) in known:
        return known[library, name]
    supported = f"supported: {', '.join(sorted(method for owner, method in known if owner == library))}"
    where = f"adapter_config.json: {_NAME_FIELDS[library]}"
    if not name:
        message = f"the config names no method; {supported}"
    elif name in REFUSED:
        message = f"{name} cannot be served per request: {REFUSED[name]}"
    else:
        message = f"this method is not served here; {supported}"
    raise LoweringError([Fault("unsupported_method", where, message, found=repr(name)[:80])])


def _name(checkpoint: Checkpoint) -> str:
    """The method's name in its library; AdapterHub leaves out the architecture of bottlenecks and of fusions, which have fields of their own."""
    if checkpoint.library == "adapters":
        inner = checkpoint.config.get("config")
        inner = inner if isinstance(inner, dict) else {}
        return str(inner.get("architecture") or ("fusion" if "query_before_ln" in inner else "bottleneck"))
    name = checkpoint.config.get(_NAME_FIELDS.get(checkpoint.library, ""))
    return name if isinstance(name, str) else ""
