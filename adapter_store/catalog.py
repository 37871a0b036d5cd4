"""The catalog: which tenant has which adapters, their versions, and what their tags name. Each change is one transaction.

Reading is in lookup, the rows of names in names. Knows no bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import BindParameter, Connection, Row, bindparam, delete, exists, func, insert, select, update

from adapter_store import aliases, lookup, names, schema
from adapter_store.blob_records import BlobRecords
from adapter_store.database import Database
from adapter_store.errors import AdapterNotFound, InvalidName, PreconditionFailed, VersionInUse
from adapter_store.idempotency import Idempotency
from adapter_store.manifest import Reference
from adapter_store.types import (
    ALWAYS,
    LATEST,
    AdapterRecord,
    AdapterVersion,
    Condition,
    DeletedVersion,
    Listed,
    Replay,
    VersionFile,
)

_names, _versions, _tags, _files = schema.names, schema.versions, schema.tags, schema.files


@dataclass(frozen=True, slots=True)
class Publication:
    """What is to be published: a tenant's name and tag shall mean these files, whose blobs are stored."""

    tenant: str
    name: str
    digest: str
    files: tuple[VersionFile, ...]
    facts: dict[str, Any]
    tag: str = LATEST
    condition: Condition = ALWAYS


@dataclass(frozen=True, slots=True)
class Once:
    """A publish that is made once, however often it is asked for. ``reply`` gives status and body of the reply to store."""

    key: str
    fingerprint: str
    reply: Callable[[AdapterVersion], tuple[int, str]]


class Catalog:
    """Adapters of all tenants. Thread-safe."""

    def __init__(self, database: Database, blob_records: BlobRecords, idempotency: Idempotency) -> None:
        self._database = database
        self._blob_records = blob_records
        self._idempotency = idempotency

    def publish(self, wanted: Publication) -> AdapterVersion:
        """Make the tag name the digest: a new version, or the one that has it. A name's first version is its latest too.

        Raises NameTaken, PreconditionFailed.
        """
        with self._database.write() as connection:
            return self._publish(connection, wanted)

    def publish_once(self, wanted: Publication, once: Once) -> AdapterVersion | Replay:
        """``publish``, unless there is a reply under the key already: then that comes back, and nothing is changed.

        Raises IdempotencyKeyReused, NameTaken, PreconditionFailed.
        """
        with self._database.write() as connection:
            done = self._idempotency.claim(connection, wanted.tenant, once.key, once.fingerprint)
            if done is not None:
                return done
            version = self._publish(connection, wanted)
            self._idempotency.store(connection, wanted.tenant, once.key, *once.reply(version))
            return version

    def version(self, tenant: str, reference: Reference) -> AdapterVersion:
        """The version of an adapter that a reference means. Raises AdapterNotFound, for an alias too."""
        with self._database.look() as connection:
            found = lookup.find_version(connection, tenant, reference)
        if found is None:
            raise lookup.not_found(reference.name)
        return found

    def resolve(self, tenant: str, reference: Reference, user: str | None = None) -> AdapterVersion:
        """The version that a reference means: an adapter's, or for a bare name the one that an alias means for this user.
        Raises AdapterNotFound."""
        try:
            return self.version(tenant, reference)
        except AdapterNotFound:
            if not reference.is_bare:
                raise
        with self._database.read() as connection:
            version = aliases.find(connection, tenant, reference.name, user)
        if version is None:
            raise lookup.not_found(reference.name)
        return version

    def get(self, tenant: str, name: str) -> AdapterRecord:
        """An adapter with all of its versions and tags. Raises AdapterNotFound."""
        with self._database.read() as connection:
            return _record(connection, tenant, name)

    def page(self, tenant: str, limit: int, after: str) -> tuple[AdapterRecord, ...]:
        """Up to ``limit`` adapters in the order of their names' bytes, those after ``after``."""
        with self._database.read() as connection:
            return lookup.page(connection, tenant, limit, after)

    def listed(self, tenant: str, limit: int, after: str) -> tuple[Listed, ...]:
        """Up to ``limit`` adapters and aliases in the order of their names' bytes, those after ``after``."""
        with self._database.look() as connection:
            return lookup.listed(connection, tenant, limit, after)

    def set_tag(self, tenant: str, name: str, tag: str, version: Reference, condition: Condition = ALWAYS) -> AdapterRecord:
        """Make a tag name a version. ``absent`` of the condition is about the tag. Raises AdapterNotFound, PreconditionFailed."""
        with self._database.write() as connection:
            row = _locked(connection, tenant, name, Condition(condition.match))
            found = lookup.find_row(connection, tenant, version)
            if found is None:
                raise lookup.not_found(name)
            if condition.absent and lookup.find_row(connection, tenant, Reference(name, tag=tag)) is not None:
                raise PreconditionFailed(f"there is a tag {name}@{tag} already; leave the condition out to move it")
            if self._point(connection, row, tag, found.number):
                names.change(connection, row)
            return _record(connection, tenant, name)

    def remove_tag(self, tenant: str, name: str, tag: str, condition: Condition = ALWAYS) -> AdapterRecord:
        """Remove a tag; the version stays. Raises AdapterNotFound, PreconditionFailed, and VersionInUse when an alias names it."""
        if tag == LATEST:
            raise InvalidName(f"the tag {LATEST!r} is what the bare name means; move it, or delete the adapter")
        with self._database.write() as connection:
            row = _locked(connection, tenant, name, condition)
            using = [alias for alias, reference in aliases.naming(connection, tenant, name) if reference.tag == tag]
            if using:
                raise VersionInUse(f"the tag {name}@{tag} is named by the alias {', '.join(using)}; change or remove it first")
            here = (_tags.c.tenant == tenant) & (_tags.c.name == name) & (_tags.c.tag == tag)
            if not connection.execute(delete(_tags).where(here)).rowcount:
                raise lookup.not_found(name)
            names.change(connection, row)
            return _record(connection, tenant, name)

    def remove(self, tenant: str, reference: Reference, condition: Condition = ALWAYS) -> list[DeletedVersion]:
        """Remove an adapter, or one version of it; the newest one left becomes its latest if need be. Returns what was removed,
        newest first.

        Raises AdapterNotFound, PreconditionFailed, and VersionInUse when an alias, or for a version another tag than
        ``latest``, names what is to go.
        """
        name = reference.name
        here = (_versions.c.tenant == tenant) & (_versions.c.name == name)
        with self._database.write() as connection:
            row = _locked(connection, tenant, name, condition)
            # Locked in the order in which ``touch`` writes them, so that the two never wait for each other.
            query = select(_versions.c.number, _versions.c.digest).where(here).order_by(_versions.c.number).with_for_update()
            digests = {row.number: row.digest for row in connection.execute(query)}
            gone = set(digests)
            if not reference.is_bare:
                found = lookup.find_row(connection, tenant, reference)
                if found is None:
                    raise lookup.not_found(name)
                _check_tags(connection, found)
                gone = {found.number}
            left = digests.keys() - gone
            _check_aliases(connection, tenant, name, {number: digests[number] for number in gone}, bool(left))
            if left:
                latest = lookup.find_row(connection, tenant, Reference(name, tag=LATEST))
                if latest is None or latest.number in gone:
                    self._point(connection, row, LATEST, max(left))
                connection.execute(delete(_versions).where(here, _versions.c.number.in_(gone)))
                names.change(connection, row)
            else:
                connection.execute(delete(_names).where(_names.c.tenant == tenant, _names.c.name == name))
            self._drop_pins(connection, tenant)
            return [DeletedVersion(name, number, digests[number]) for number in sorted(gone, reverse=True)]

    def touch(self, used: Mapping[tuple[str, str, int], float]) -> None:
        """Write down when versions (tenant, name, number) were last used; those that are gone, and older times, are passed over, and so
        are times before a version was made: they speak of a deleted one, whose number it has."""
        if not used:
            return
        last: BindParameter[float] = bindparam("used")
        statement = update(_versions).where(
            _versions.c.tenant == bindparam("of_tenant"),
            _versions.c.name == bindparam("of_name"),
            _versions.c.number == bindparam("of_number"),
            func.coalesce(_versions.c.last_used, _versions.c.created) < last,
        )
        rows = [
            {"of_tenant": tenant, "of_name": name, "of_number": number, "used": when}
            for (tenant, name, number), when in sorted(used.items())
        ]
        with self._database.write() as connection:
            connection.execute(statement.values(last_used=last), rows)

    def digests(self) -> set[str]:
        """The digests of all versions of all tenants."""
        with self._database.read() as connection:
            return set(connection.execute(select(_versions.c.digest).distinct()).scalars())

    def with_digests(self, digests: Collection[str]) -> list[AdapterVersion]:
        """All versions of all tenants with these digests."""
        with self._database.read() as connection:
            return lookup.find_digests(connection, digests)

    def present(self, digests: Collection[str]) -> set[str]:
        """Those of which some tenant has a version."""
        with self._database.read() as connection:
            return lookup.present_digests(connection, digests)

    def _publish(self, connection: Connection, wanted: Publication) -> AdapterVersion:
        row = names.take(self._database, connection, wanted.tenant, wanted.name, schema.ADAPTER, wanted.condition)
        version = lookup.find_digest(connection, wanted.tenant, wanted.name, wanted.digest)
        if version is None:
            version = self._add(connection, row, wanted)
        if self._point(connection, row, wanted.tag, version.number):
            names.change(connection, row)
        return version

    def _add(self, connection: Connection, row: Row[Any], wanted: Publication) -> AdapterVersion:
        self._blob_records.hold(connection, (file.sha256 for file in wanted.files))
        now, nbytes = self._database.now(), sum(file.nbytes for file in wanted.files)
        files = tuple(sorted(wanted.files, key=lambda file: file.role))
        version = AdapterVersion(row.tenant, row.name, row.next_number, wanted.digest, now, nbytes, files, wanted.facts)
        here = {"tenant": row.tenant, "name": row.name, "number": version.number}
        values = {"digest": version.digest, "created": now, "nbytes": nbytes, "facts": json.dumps(version.facts)}
        connection.execute(insert(_versions).values(**here, **values))
        connection.execute(
            insert(_files),
            [{**here, "role": file.role, "filename": file.name, "sha256": file.sha256} for file in files],
        )
        names.change(connection, row, next_number=version.number + 1)
        if version.number == 1:
            self._point(connection, row, LATEST, 1)
        return version

    def _drop_pins(self, connection: Connection, tenant: str) -> None:
        """A tenant pins what it has; with its last version of a digest the pin goes."""
        # Of two removals at once neither sees what the other has removed, and each would leave the pin to the other.
        self._database.serialize(connection, f"pins of {tenant}")
        pins = schema.pins
        has = exists().where(_versions.c.tenant == tenant, _versions.c.digest == pins.c.digest)
        connection.execute(delete(pins).where(pins.c.tenant == tenant, ~has))

    def _point(self, connection: Connection, row: Row[Any], tag: str, number: int) -> bool:
        """Make a tag of a locked name name a version; False when it does already."""
        found = lookup.find_row(connection, row.tenant, Reference(row.name, tag=tag))
        if found is not None and found.number == number:
            return False
        statement = self._database.insert(_tags).values(tenant=row.tenant, name=row.name, tag=tag, number=number)
        connection.execute(statement.on_conflict_do_update(index_elements=["tenant", "name", "tag"], set_={"number": number}))
        return True


def _locked(connection: Connection, tenant: str, name: str, condition: Condition) -> Row[Any]:
    row = names.lock(connection, tenant, name, schema.ADAPTER)
    if row is None:
        raise lookup.not_found(name)
    names.check(condition, row)
    return row


def _record(connection: Connection, tenant: str, name: str) -> AdapterRecord:
    record = lookup.find_record(connection, tenant, name)
    if record is None:
        raise lookup.not_found(name)
    return record


def _check_tags(connection: Connection, version: Row[Any]) -> None:
    query = select(_tags.c.tag).where(_tags.c.tenant == version.tenant, _tags.c.name == version.name, _tags.c.tag != LATEST)
    using = connection.execute(query.where(_tags.c.number == version.number).order_by(_tags.c.tag)).scalars().all()
    if using:
        raise VersionInUse(f"{version.name}@v{version.number} has the tag {', '.join(using)}; move or remove it first")


def _check_aliases(connection: Connection, tenant: str, name: str, gone: dict[int, str], some_left: bool) -> None:
    """Whether an alias means what is to go (number → digest). One that names a tag is safe: ``latest`` moves on, and a version with
    another tag is not removed."""
    using = sorted(
        {
            alias
            for alias, reference in aliases.naming(connection, tenant, name)
            if not some_left
            or reference.number in gone
            or (
                reference.digest_prefix is not None
                and any(digest.startswith(reference.digest_prefix) for digest in gone.values())
            )
        }
    )
    if using:
        raise VersionInUse(f"the alias {', '.join(using)} means {name!r} or this version; change or remove it first")
