"""What the store gives back and takes: plain frozen data. Knows no database and no file.

Times are seconds since the epoch; sizes are bytes; a sha256 is 64 hex digits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adapter_store.errors import IdempotencyKeyReused

LATEST = "latest"
"""The tag that a bare name means. Every adapter has it."""


@dataclass(frozen=True, slots=True)
class VersionFile:
    """One file of a version. ``name`` is what it was called when it was uploaded; a fusion's child has ``<child>/`` before it."""

    role: str
    name: str
    sha256: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version of a name. Only ``last_used`` changes; it is None until the first use was written down."""

    tenant: str
    name: str
    number: int
    digest: str
    created: float
    nbytes: int
    files: tuple[VersionFile, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    last_used: float | None = None

    @property
    def blobs(self) -> dict[str, str]:
        """The files' sha256 by role."""
        return {file.role: file.sha256 for file in self.files}


@dataclass(frozen=True, slots=True)
class DeletedVersion:
    """What is left to say of a version that was removed."""

    name: str
    number: int
    digest: str


@dataclass(frozen=True, slots=True)
class Listed:
    """An adapter or an alias in a list of both. ``created`` is when an adapter's latest version was made, and None for an alias."""

    name: str
    created: float | None

    @property
    def is_alias(self) -> bool:
        """Whether the name means other names' versions."""
        return self.created is None


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A name with all of its versions, newest first, and its tags. ``etag`` changes with every change of any of these."""

    tenant: str
    name: str
    versions: tuple[AdapterVersion, ...]
    tags: dict[str, int]
    etag: str

    @property
    def latest(self) -> AdapterVersion:
        """The version that the bare name means."""
        return next(version for version in self.versions if version.number == self.tags[LATEST])

    def tags_of(self, number: int) -> tuple[str, ...]:
        """The tags that name a version, in alphabetical order."""
        return tuple(sorted(tag for tag, named in self.tags.items() if named == number))


@dataclass(frozen=True, slots=True)
class Target:
    """One of the adapters that an alias means. ``weight`` is its share, relative to the other targets'."""

    reference: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Alias:
    """A name that means other names' versions, each for a share of the users."""

    tenant: str
    name: str
    targets: tuple[Target, ...]
    etag: str


@dataclass(frozen=True, slots=True)
class Condition:
    """What must hold for a change to be made: the name still has the etag ``match`` (HTTP's If-Match), or there is none yet
    (``absent``, HTTP's ``If-None-Match: *``). Otherwise PreconditionFailed. Without either, the change is made in any case."""

    match: str | None = None
    absent: bool = False


ALWAYS = Condition()


@dataclass(frozen=True, slots=True)
class Replay:
    """The stored reply to a request with an idempotency key. ``fingerprint`` says which request it answers."""

    fingerprint: str
    status: int
    body: str

    def to(self, fingerprint: str) -> Replay:
        """Itself, for a request with this fingerprint. Raises IdempotencyKeyReused for another."""
        if self.fingerprint != fingerprint:
            raise IdempotencyKeyReused(
                "this idempotency key came with another name, tag or other files in the last 24 hours; use a new key for a new request"
            )
        return self


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep removed: blobs that nobody needs, resumable uploads that nobody goes on with, and files and directories that crashes
    left behind."""

    blobs: int
    uploads: int
    leftovers: int
