"""Reading the catalog: which version a reference means, and pages of adapters. Changes nothing, and knows no alias.

Everything works on a connection, so that a caller can look and change in one transaction.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, Row, bindparam, select
from sqlalchemy.sql import Select

from adapter_store import schema
from adapter_store.errors import AdapterNotFound
from adapter_store.manifest import Reference
from adapter_store.types import LATEST, AdapterRecord, AdapterVersion, VersionFile

_names, _versions, _tags, _files = schema.names, schema.versions, schema.tags, schema.files

_MAX_IN = 500
"""Parameters of one query; databases bound them."""

# Built once: they are asked for every request.
_OF_NAME = select(_versions).where(_versions.c.tenant == bindparam("tenant"), _versions.c.name == bindparam("name"))
_BY_NUMBER = _OF_NAME.where(_versions.c.number == bindparam("number"))
_BY_DIGEST = _OF_NAME.where(_versions.c.digest.startswith(bindparam("digest"))).limit(2)
_BY_TAG = _OF_NAME.join(_tags).where(_tags.c.tag == bindparam("tag"))
_FILES = (
    select(_files.c.role, _files.c.filename, _files.c.sha256, schema.blobs.c.nbytes)
    .join(schema.blobs)
    .where(_files.c.tenant == bindparam("tenant"), _files.c.name == bindparam("name"), _files.c.number == bindparam("number"))
    .order_by(_files.c.role)
)


def find_version(connection: Connection, tenant: str, reference: Reference) -> AdapterVersion | None:
    """The version that a reference to an adapter means for this tenant, or None."""
    row = find_row(connection, tenant, reference)
    if row is None:
        return None
    files = connection.execute(_FILES, {"tenant": tenant, "name": row.name, "number": row.number}).all()
    return _version(row, [VersionFile(*file) for file in files])


def find_row(connection: Connection, tenant: str, reference: Reference) -> Row[Any] | None:
    """The row of ``versions`` that a reference means, or None; None too for a prefix that is the start of two digests."""
    here = {"tenant": tenant, "name": reference.name}
    if reference.number is not None:
        return connection.execute(_BY_NUMBER, {**here, "number": reference.number}).first()
    if reference.digest_prefix is not None:
        rows = connection.execute(_BY_DIGEST, {**here, "digest": reference.digest_prefix}).all()
        return rows[0] if len(rows) == 1 else None
    return connection.execute(_BY_TAG, {**here, "tag": reference.tag or LATEST}).first()


def find_digest(connection: Connection, tenant: str, name: str, digest: str) -> AdapterVersion | None:
    """The version of a name that has exactly this digest."""
    return find_version(connection, tenant, Reference(name, digest_prefix=digest))


def find_record(connection: Connection, tenant: str, name: str) -> AdapterRecord | None:
    """An adapter with all of its versions and tags, or None."""
    records = _records(connection, _adapters(tenant).where(_names.c.name == name), tenant)
    return records[0] if records else None


def find_digests(connection: Connection, digests: Collection[str]) -> list[AdapterVersion]:
    """All versions of all tenants with these digests."""
    found, wanted = [], sorted(digests)
    for start in range(0, len(wanted), _MAX_IN):
        some = _versions.c.digest.in_(wanted[start : start + _MAX_IN])
        query = select(_versions).where(some).order_by(_versions.c.tenant, _versions.c.name, _versions.c.number)
        for row in connection.execute(query).all():
            key = {"tenant": row.tenant, "name": row.name, "number": row.number}
            found.append(_version(row, [VersionFile(*file) for file in connection.execute(_FILES, key).all()]))
    return found


def page(connection: Connection, tenant: str, limit: int, after: str) -> tuple[AdapterRecord, ...]:
    """Up to ``limit`` adapters in the order of their names' bytes, those after ``after``."""
    return _records(connection, _adapters(tenant).where(_names.c.name > after).limit(limit), tenant)


def not_found(name: str) -> AdapterNotFound:
    """The same words for what is not there and what is somebody else's."""
    return AdapterNotFound(
        f"there is no adapter {name!r}, or no such version or tag of it; push it, or list yours with GET /v1/adapters"
    )


def _adapters(tenant: str) -> Select[Any]:
    return select(_names).where(_names.c.tenant == tenant, _names.c.kind == schema.ADAPTER).order_by(_names.c.name)


def _records(connection: Connection, query: Select[Any], tenant: str) -> tuple[AdapterRecord, ...]:
    found = connection.execute(query).all()
    names = [row.name for row in found]
    of_files = (
        select(_files.c.name, _files.c.number, _files.c.role, _files.c.filename, _files.c.sha256, schema.blobs.c.nbytes)
        .join(schema.blobs)
        .where(_files.c.tenant == tenant, _files.c.name.in_(names))
        .order_by(_files.c.role)
    )
    files: dict[tuple[str, int], list[VersionFile]] = {}
    for name, number, *file in connection.execute(of_files):
        files.setdefault((name, number), []).append(VersionFile(*file))
    of_versions = (
        select(_versions).where(_versions.c.tenant == tenant, _versions.c.name.in_(names)).order_by(_versions.c.number.desc())
    )
    versions: dict[str, list[AdapterVersion]] = {}
    for row in connection.execute(of_versions).all():
        versions.setdefault(row.name, []).append(_version(row, files[row.name, row.number]))
    of_tags = select(_tags.c.name, _tags.c.tag, _tags.c.number).where(_tags.c.tenant == tenant, _tags.c.name.in_(names))
    tags: dict[str, dict[str, int]] = {}
    for name, tag, number in connection.execute(of_tags.order_by(_tags.c.tag)):
        tags.setdefault(name, {})[tag] = number
    return tuple(AdapterRecord(tenant, row.name, tuple(versions[row.name]), tags[row.name], row.etag) for row in found)


def _version(row: Any, files: list[VersionFile]) -> AdapterVersion:
    return AdapterVersion(
        tenant=row.tenant,
        name=row.name,
        number=row.number,
        digest=row.digest,
        created=row.created,
        nbytes=row.nbytes,
        files=tuple(files),
        facts=json.loads(row.facts),
        last_used=row.last_used,
    )
