"""The catalog as plain Python, for one tenant: what every operation must do, and which error it must end with."""

from __future__ import annotations

from dataclasses import dataclass, field

from adapter_store.errors import AdapterNotFound, InvalidAlias, InvalidName, NameTaken, PreconditionFailed, VersionInUse
from adapter_store.manifest import Reference, parse_reference


@dataclass
class Adapter:
    """Contents by version number, and what the tags name."""

    revision: int
    versions: dict[int, int] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)
    next_number: int = 1


@dataclass
class AliasOf:
    """References, in their order."""

    revision: int
    targets: tuple[str, ...] = ()


class Model:
    """``revision`` stands for the etag: every change of a name gives it a number that there never was."""

    def __init__(self) -> None:
        self.names: dict[str, Adapter | AliasOf] = {}
        self._revision = 0

    def publish(self, name: str, content: int, tag: str, match: int | None, absent: bool) -> int:
        found = self._take(name, match, absent)
        if isinstance(found, AliasOf):
            raise NameTaken
        adapter = found or Adapter(self._next())
        self.names[name] = adapter
        before = dict(adapter.tags)
        number = next((number for number, held in adapter.versions.items() if held == content), adapter.next_number)
        if number not in adapter.versions:
            adapter.versions[number] = content
            adapter.next_number += 1
            adapter.tags.setdefault("latest", number)
        adapter.tags[tag] = number
        if adapter.tags != before:
            adapter.revision = self._next()
        return number

    def set_tag(self, name: str, tag: str, version: str, match: int | None, absent: bool) -> None:
        adapter = self._adapter(name)
        self._check(adapter, match, absent=False)
        number = self.number(parse_reference(f"{name}@{version}"))
        if absent and tag in adapter.tags:
            raise PreconditionFailed
        if adapter.tags.get(tag) != number:
            adapter.tags[tag] = number
            adapter.revision = self._next()

    def remove_tag(self, name: str, tag: str, match: int | None, absent: bool) -> None:
        if tag == "latest":
            raise InvalidName
        adapter = self._adapter(name)
        self._check(adapter, match, absent)
        if f"{name}@{tag}" in self._aliased(name):
            raise VersionInUse
        if tag not in adapter.tags:
            raise AdapterNotFound
        del adapter.tags[tag]
        adapter.revision = self._next()

    def set_alias(self, name: str, targets: tuple[str, ...], match: int | None, absent: bool) -> None:
        if len(set(targets)) < len(targets):
            raise InvalidAlias
        found = self._take(name, match, absent)
        if isinstance(found, Adapter):
            raise NameTaken
        for target in targets:
            reference = parse_reference(target)
            if reference.name == name or isinstance(self.names.get(reference.name), AliasOf):
                raise InvalidAlias
            self.number(reference)
        self.names[name] = AliasOf(self._next(), targets)

    def remove_alias(self, name: str, match: int | None, absent: bool) -> None:
        alias = self.names.get(name)
        if not isinstance(alias, AliasOf):
            raise AdapterNotFound
        self._check(alias, match, absent)
        del self.names[name]

    def delete(self, text: str, match: int | None, absent: bool) -> set[int]:
        reference = parse_reference(text)
        adapter = self._adapter(reference.name)
        self._check(adapter, match, absent)
        aliased = self._aliased(reference.name)
        gone = set(adapter.versions)
        if not reference.is_bare:
            gone = {self.number(reference)}
            if any(tag != "latest" and number in gone for tag, number in adapter.tags.items()):
                raise VersionInUse
        left = set(adapter.versions) - gone
        if (aliased and not left) or any(f"{reference.name}@v{number}" in aliased for number in gone):
            raise VersionInUse
        if not left:
            del self.names[reference.name]
            return gone
        for number in gone:
            del adapter.versions[number]
        if adapter.tags["latest"] in gone:
            adapter.tags["latest"] = max(left)
        adapter.revision = self._next()
        return gone

    def number(self, reference: Reference) -> int:
        """The version that a reference to an adapter means."""
        adapter = self._adapter(reference.name)
        number = reference.number if reference.number is not None else adapter.tags.get(reference.tag or "latest")
        if number is None or number not in adapter.versions:
            raise AdapterNotFound
        return number

    def _adapter(self, name: str) -> Adapter:
        adapter = self.names.get(name)
        if not isinstance(adapter, Adapter):
            raise AdapterNotFound
        return adapter

    def _take(self, name: str, match: int | None, absent: bool) -> Adapter | AliasOf | None:
        found = self.names.get(name)
        if found is not None:
            self._check(found, match, absent)
        elif match is not None:
            raise PreconditionFailed
        return found

    @staticmethod
    def _check(found: Adapter | AliasOf, match: int | None, absent: bool) -> None:
        if absent or match not in (None, found.revision):
            raise PreconditionFailed

    def _aliased(self, name: str) -> set[str]:
        """The references by which aliases mean an adapter."""
        targets = {target for alias in self.names.values() if isinstance(alias, AliasOf) for target in alias.targets}
        return {target for target in targets if target.partition("@")[0] == name}

    def _next(self) -> int:
        self._revision += 1
        return self._revision
