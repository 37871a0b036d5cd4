"""A checkpoint while it is being lowered: which tensor belongs to which site, what was used, and what is wrong so far.

Knows which site a key belongs to once ``keys`` has read it, not what any tensor means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.base_spec import BaseSpec, SiteKind, SiteSpec
from server.adapters.faults import Fault, LoweringError
from server.adapters.lower.checkpoint import Checkpoint
from server.adapters.lower.keys import key_layout

_LITERAL = re.compile(r"[A-Za-z0-9_.\-]{1,256}")
_MAX_PATTERNS = 4096
_MAX_FAULTS = 64
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Source:
    """Config and tensors, grouped by site. ``take`` marks a tensor as used; what is left over at the end is a fault."""

    def __init__(
        self, checkpoint: Checkpoint, spec: BaseSpec, max_numbers: int = 1 << 28, file: str = "adapter_config.json"
    ) -> None:
        self._max_numbers = self._left = max_numbers
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.file = file
        """The name of the config's file, for messages."""
        self._spec = spec
        self._sites = spec.by_name()
        self._layout = key_layout(checkpoint, spec)
        self._faults: list[Fault] = []
        self._by_site: dict[str, dict[str, tuple[str, Tensor]]] = {}
        self._shared: dict[str, tuple[str, Tensor]] = {}
        for key, tensor in checkpoint.tensors.items():
            self._file(key, tensor)

    def part(self, checkpoint: Checkpoint, file: str) -> Source:
        """Another checkpoint that belongs to this one (a head, a fusion's child). What is wrong with it is wrong with this one too."""
        part = Source(checkpoint, self._spec, self._left, file)
        self._faults += part._faults
        part._faults = self._faults
        return part

    def sites(self, prefix: str = "", kinds: tuple[SiteKind, ...] = ()) -> list[SiteSpec]:
        """Sites that have a tensor whose key ends with ``prefix…``, in the base's order. With ``kinds``, one at any other module is a fault."""
        found = []
        for name, spec in self._sites.items():
            if not self.has_any(name, prefix):
                continue
            if kinds and spec.kind not in kinds:
                message = f"tensors {prefix}… are not served on a module of the kind {spec.kind}; train without this module"
                self.fault("wrong_module", name, message, " or ".join(kinds), spec.kind)
            else:
                found.append(spec)
        return found

    def has(self, site: str, tail: str) -> bool:
        return tail in self._by_site.get(site, {})

    def has_any(self, site: str, prefix: str) -> bool:
        """Whether a site has a tensor under a tail that starts so."""
        return any(tail.startswith(prefix) for tail in self._by_site.get(site, ()))

    def tails(self, site: str) -> tuple[str, ...]:
        """What is left of the keys of a site's tensors after the site."""
        return tuple(self._by_site.get(site, {}))

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of tensors that belong to no site: those of the method itself (``vera_A``, ``prompt_embeddings``), and of task heads."""
        return tuple(self._shared)

    def take_shared(self, name: str, shape: tuple[int | None, ...] | None = None, *, integers: bool = False) -> Tensor | None:
        """``take`` for a tensor of ``shared``."""
        return self._checked(self._shared.pop(name, None), shape, integers)

    def take(self, site: str, tail: str, shape: tuple[int | None, ...] | None = None, *, integers: bool = False) -> Tensor | None:
        """A site's tensor by the rest of its key, or None. A wrong shape is recorded and gives None too; None in ``shape`` is any size.

        Tensors are floating point, or with ``integers`` integers, which are given as int64.
        """
        return self._checked(self._by_site.get(site, {}).pop(tail, None), shape, integers)

    def _checked(self, found: tuple[str, Tensor] | None, shape: tuple[int | None, ...] | None, integers: bool) -> Tensor | None:
        if found is None:
            return None
        key, tensor = found
        if shape is not None and not _fits(tuple(tensor.shape), shape):
            expected = "(" + ", ".join("*" if size is None else str(size) for size in shape) + ")"
            self.fault(
                "wrong_shape",
                key,
                "the tensor does not fit the base model; was it trained on another one?",
                expected,
                str(tuple(tensor.shape)),
            )
            return None
        if not (tensor.dtype in _INTEGERS if integers else tensor.is_floating_point()):
            wanted = "integers" if integers else "floating point"
            self.fault("wrong_dtype", key, f"the tensor must be {wanted}", found=str(tensor.dtype))
            return None
        return tensor.long() if integers else tensor

    def fault(self, code: str, where: str, message: str, expected: str | None = None, found: str | None = None) -> None:
        self._faults.append(Fault(code, where, message, expected, found))

    def field_fault(self, field: str, message: str, expected: str | None = None) -> None:
        self._field_fault(self.config, "", field, message, expected)

    def _field_fault(self, values: Mapping[str, Any], prefix: str, field: str, message: str, expected: str | None = None) -> None:
        where = f"{self.file}: {prefix}{field}"
        self.fault("unsupported_field", where, message, expected, repr(values.get(field))[:120])

    def reserve(self, count: int) -> None:
        """Announce ``count`` numbers of the program that are about to be made: a few stored ones can stand for very many.

        Raises LoweringError when the program would be larger than ``max_numbers`` in all.
        """
        self._left -= count
        if self._left < 0:
            expected = f"at most {self._max_numbers} numbers"
            self.fault(
                "program_too_large",
                "adapter",
                "the lowered adapter would be too large; train fewer modules, or with a smaller rank",
                expected,
            )
            self.stop_if_faulty()

    def stop_if_faulty(self) -> None:
        """Raise LoweringError with what was found so far, if anything."""
        if self._faults:
            raise LoweringError(self._faults[:_MAX_FAULTS])

    def check_fields(
        self, rules: Mapping[str, Callable[[Any], str | None]], values: Mapping[str, Any] | None = None, prefix: str = ""
    ) -> None:
        """Every field must be known, with an acceptable value. A field that is null or empty, and unknown, says nothing.

        ``values`` are the fields of an object inside the config, which ``prefix`` leads to; without it the config's own.
        """
        values = self.config if values is None else values
        for field, value in values.items():
            rule = rules.get(field)
            if rule is None:
                if value not in (None, False, "", [], {}):
                    message = "this field is not known for this method, and ignoring it could change the result; leave it out if it does nothing"
                    self._field_fault(values, prefix, field[:80], message)
            elif (expected := rule(value)) is not None:
                self._field_fault(values, prefix, field, "this value is not supported", expected)

    def check_all_used(self) -> None:
        """A tensor that nothing used would be silently ignored: refuse it."""
        # A layer and its attention hold modules; what belongs to neither of them by its own name belongs nowhere.
        whole = [site for site in self._by_site if self._sites[site].kind in ("attention", "layer")]
        lost = [key for site in whole for key, _ in self._by_site.pop(site).values()]
        for key in [*(key for key, _ in self._shared.values()), *lost]:
            self.fault(
                "unmatched_tensor",
                key[:200],
                f"the base model ({self._spec.family}) has no module that this tensor belongs to; was it trained on another one?",
            )
        for tails in self._by_site.values():
            for key, _ in tails.values():
                self.fault(
                    "unused_tensor",
                    key[:200],
                    "the method has no use for this tensor, and ignoring it could change the result; leave it out if it belongs to nothing",
                )

    def pattern(self, field: str, site: str, default: Any) -> Any:
        """PEFT's ``rank_pattern``/``alpha_pattern`` rule for one module: the first key that is its path, or a suffix of it at a dot.

        PEFT matches keys as regular expressions. A tenant's expression is never run here: keys must be plain module names.
        """
        patterns = self.config.get(field) or {}
        if not isinstance(patterns, dict) or len(patterns) > _MAX_PATTERNS:
            self._pattern_fault(field, f"must be an object of at most {_MAX_PATTERNS} module names")
            return default
        path = "." + site
        for key, value in patterns.items():
            literal = key.replace("\\.", ".")
            if not _LITERAL.fullmatch(literal):
                self._pattern_fault(
                    field, f"key {key[:80]!r} is not a plain module name; write names such as 'q_proj' or full paths"
                )
                return default
            if path.endswith("." + literal):
                return value
        return default

    def _pattern_fault(self, field: str, message: str) -> None:
        where = f"{self.file}: {field}"
        if not any(fault.where == where for fault in self._faults):
            self.fault("unsupported_field", where, message)

    def _file(self, key: str, tensor: Tensor) -> None:
        path = self._layout.path(key)
        if path is None:
            return
        parts = path.split(".")
        for end in range(len(parts) - 1, 0, -1):
            site = self._site(".".join(parts[:end]))
            if site is not None:
                self._put(self._by_site.setdefault(site, {}), ".".join(parts[end:]), key, tensor)
                return
        self._put(self._shared, path, key, tensor)

    def _put(self, place: dict[str, tuple[str, Tensor]], name: str, key: str, tensor: Tensor) -> None:
        if name in place and not (self._layout.has_aliases and torch.equal(tensor, place[name][1])):
            self.fault(
                "duplicate_tensor",
                key[:200],
                "two tensors stand for the same thing; keep one of them",
                found=place[name][0][:200],
            )
        place[name] = (key, tensor)

    def _site(self, path: str) -> str | None:
        """A site by its path, also where a headless or a differently wrapped model was trained."""
        prefix = self._spec.backbone_prefix
        for candidate in (path, prefix + path, path.removeprefix(prefix)):
            if candidate in self._sites:
                return candidate
        return None


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(shape) == len(expected) and all(want is None or size == want for size, want in zip(shape, expected, strict=True))
