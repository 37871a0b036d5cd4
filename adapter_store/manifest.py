"""Identity: names, references, and the digest of a manifest. Knows no file and no database."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from adapter_store.errors import InvalidDigest, InvalidName

RESERVED_NAMES = frozenset({"base"})
NAME_GRAMMAR = "[a-z0-9][a-z0-9._-]{0,63}"
_NAME = re.compile(NAME_GRAMMAR)
_DIGEST = re.compile("sha256:[0-9a-f]{64}")
_DIGEST_PREFIX = re.compile("sha256:[0-9a-f]{12,64}")
_VERSION = re.compile("v[1-9][0-9]{0,8}")
TAG_GRAMMAR = "[a-z][a-z0-9._-]{0,63}"
_TAG = re.compile(TAG_GRAMMAR)
_LIKE_VERSION = re.compile("v[0-9]+")


@dataclass(frozen=True, slots=True)
class Reference:
    """What a caller asks for: ``name``, ``name@v3``, ``name@sha256:<12 to 64 hex digits>`` or ``name@tag``. At most one of the
    three is set; with none, ``name`` is an alias, or an adapter and its tag ``latest`` is meant."""

    name: str
    number: int | None = None
    digest_prefix: str | None = None
    tag: str | None = None

    @property
    def is_bare(self) -> bool:
        """Whether it is a name and nothing else."""
        return self.number is None and self.digest_prefix is None and self.tag is None


def check_name(name: str) -> str:
    """The name itself, or InvalidName."""
    if not _NAME.fullmatch(name):
        raise InvalidName(f"adapter name {name[:80]!r} does not match {NAME_GRAMMAR}: lower-case letters, digits, '.', '_', '-'")
    if name in RESERVED_NAMES:
        raise InvalidName(f"the name {name!r} is reserved for the base model; choose another")
    return name


def check_tag(tag: str) -> str:
    """The tag itself, or InvalidName."""
    if not _TAG.fullmatch(tag) or _LIKE_VERSION.fullmatch(tag):
        raise InvalidName(f"tag {tag[:80]!r} does not match {TAG_GRAMMAR}, or looks like a version number")
    return tag


def parse_reference(text: str) -> Reference:
    """Read a reference. Raises InvalidName."""
    name, at, version = text.partition("@")
    check_name(name)
    if not at:
        return Reference(name)
    if _VERSION.fullmatch(version):
        return Reference(name, number=int(version[1:]))
    if _DIGEST_PREFIX.fullmatch(version):
        return Reference(name, digest_prefix=version)
    if _TAG.fullmatch(version) and not _LIKE_VERSION.fullmatch(version):
        return Reference(name, tag=version)
    raise InvalidName(
        f"version {version[:80]!r} is neither v<number>, nor sha256:<at least 12 hex digits>, nor a tag ({TAG_GRAMMAR})"
    )


def parse_blob_digest(text: str) -> str:
    """The 64 hex digits of ``sha256:…``. Raises InvalidDigest."""
    if not _DIGEST.fullmatch(text):
        raise InvalidDigest(f"{text[:80]!r} is not the digest of a blob: sha256: and 64 lower-case hex digits")
    return text.removeprefix("sha256:")


def manifest_digest(blobs: Mapping[str, str]) -> str:
    """The digest of an adapter: of its canonical manifest {role → blob sha256}, so that packaging does not matter."""
    canonical = json.dumps({"schema": 1, "blobs": dict(sorted(blobs.items()))}, separators=(",", ":"), sort_keys=True)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
