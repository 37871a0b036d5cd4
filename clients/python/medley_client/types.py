"""What calls return. Fields that a newer server adds are kept out of the way, never an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

AdapterChoice = str | Mapping[str, float]
"""One adapter by name, or several with their weights: ``{"legal": 0.7, "german": 0.3}``."""


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a stream. ``generated_text`` and ``finish_reason`` are set on the last one."""

    id: int
    text: str
    logprob: float | None
    special: bool
    generated_text: str | None = None
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Generated:
    """A whole text. ``finish_reason``: length, eos_token or stop_sequence."""

    text: str
    finish_reason: str
    prompt_tokens: int
    generated_tokens: int
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class ClassifiedToken:
    """What a classifier says of one token of a text."""

    text: str
    label: str
    scores: dict[str, float]
    special: bool = False


@dataclass(frozen=True, slots=True)
class Classified:
    """What a classifier says of one text. ``scores``: probabilities by label, the best first; ``labels``: those that apply, where several may.

    A classifier of tokens gives ``tokens`` instead.
    """

    label: str = ""
    scores: dict[str, float] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    tokens: tuple[ClassifiedToken, ...] = ()


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file of an adapter as it was uploaded. ``digest``: ``sha256:…``. A fusion's adapters have their name before their files': ``a/…``."""

    name: str
    digest: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Quarantine:
    """Why an adapter is refused at once: it failed so often in a row, the last time with this error, in seconds since the epoch."""

    code: str
    failures: int
    at: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter on the server, as the version that its bare name means, or one of its ``versions``.

    ``facts``: method, rank, sites and sizes. ``tags``: tag → version; of one of the ``versions``, those that name it. Times are seconds
    since the epoch; ``last_used`` is None before the first use. ``etag`` changes with every change of the name; push, tag and delete take
    it as ``if_match``. ``residency`` (replica → state), ``load_seconds`` (state → how long it took to reach it), ``pinned`` and
    ``quarantine`` are there where one adapter is shown, loaded or pinned.
    """

    name: str
    version: str
    digest: str
    created: int
    nbytes: int
    facts: dict[str, Any] = field(default_factory=dict)
    files: tuple[StoredFile, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    etag: str = ""
    last_used: float | None = None
    versions: tuple[Adapter, ...] = ()
    residency: dict[str, str] = field(default_factory=dict)
    load_seconds: dict[str, float] = field(default_factory=dict)
    pinned: bool = False
    quarantine: Quarantine | None = None


@dataclass(frozen=True, slots=True)
class PushedAdapter(Adapter):
    """What a push made. ``skipped`` lists files that the server did not open."""

    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PulledAdapter:
    """What a pull wrote, or found there already, in ``directory``."""

    name: str
    version: str
    directory: str
    files: tuple[StoredFile, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """One of the adapters that an alias means. It gets its ``weight``'s share of the sum of all weights."""

    adapter: str
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Alias:
    """A name that means one adapter version or several. A user always gets the same one."""

    name: str
    targets: tuple[Target, ...]
    etag: str = ""
