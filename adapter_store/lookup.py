"""Reading the catalog: which version a reference means, and pages of adapters. Changes nothing, and knows not what an alias means.

Everything works on a connection, so that a caller can look and change in one transaction.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from sqlalchemy import Column, Connection, Row, Table, and_, bindparam, select
from sqlalchemy.sql import Select

from adapter_store import schema
from adapter_store.errors import AdapterNotFound
from adapter_store.manifest import Reference
from adapter_store.types import LATEST, AdapterRecord, AdapterVersion, Listed, VersionFile

_names, _versions, _tags, _files = schema.names, schema.versions, schema.tags, schema.files

_file_columns = (_files.c.role, _files.c.filename, _files.c.sha256, schema.blobs.c.nbytes)

_MAX_IN = 500
"""Parameters of one query; databases bound them."""

# Built once: a reference is resolved with every request.
_OF_NAME = select(_versions).where(_versions.c.tenant == bindparam("tenant"), _versions.c.name == bindparam("name"))
_BY_NUMBER = _OF_NAME.where(_versions.c.number == bindparam("number"))
_BY_DIGEST = _OF_NAME.where(_versions.c.digest.startswith(bindparam("digest")))
_BY_TAG = _OF_NAME.join(_tags).where(_tags.c.tag == bindparam("tag"))
_WITH_FILES = {
    query: query.add_columns(*(column.label(f"file_{column.name}") for column in _file_columns))
    .join(_files, and_(*(_files.c[key] == _versions.c[key] for key in ("tenant", "name", "number"))))
    .join(schema.blobs)
    .order_by(_versions.c.number, _files.c.role)
    for query in (_BY_NUMBER, _BY_DIGEST, _BY_TAG)
}


def _in_page(table: Table, *columns: Column[Any]) -> Select[Any]:
    """Rows of all names from ``first`` to ``last``; aliases have none."""
    return select(*columns).where(
        table.c.tenant == bindparam("tenant"), table.c.name.between(bindparam("first"), bindparam("last"))
    )


_PAGE_FILES = _in_page(_files, _files.c.name, _files.c.number, *_file_columns).join(schema.blobs).order_by(_files.c.role)
_PAGE_VERSIONS = _in_page(_versions, *_versions.c).order_by(_versions.c.number.desc())
_PAGE_TAGS = _in_page(_tags, _tags.c.name, _tags.c.tag, _tags.c.number).order_by(_tags.c.tag)


def find_version(connection: Connection, tenant: str, reference: Reference) -> AdapterVersion | None:
    """The version that a reference to an adapter means for this tenant, or None. One statement."""
    query, parameters = _query(tenant, reference)
    rows = connection.execute(_WITH_FILES[query], parameters).all()
    if len({row.number for row in rows}) != 1:
        return None
    return _version(rows[0], [VersionFile(*row[-len(_file_columns) :]) for row in rows])


def find_row(connection: Connection, tenant: str, reference: Reference) -> Row[Any] | None:
    """The row of ``versions`` that a reference means, or None; None too for a prefix that is the start of two digests."""
    query, parameters = _query(tenant, reference)
    rows = connection.execute(query, parameters).all()
    return rows[0] if len(rows) == 1 else None


def _query(tenant: str, reference: Reference) -> tuple[Select[Any], dict[str, Any]]:
    here: dict[str, Any] = {"tenant": tenant, "name": reference.name}
    if reference.number is not None:
        return _BY_NUMBER, {**here, "number": reference.number}
    if reference.digest_prefix is not None:
        return _BY_DIGEST, {**here, "digest": reference.digest_prefix}
    return _BY_TAG, {**here, "tag": reference.tag or LATEST}


def find_digest(connection: Connection, tenant: str, name: str, digest: str) -> AdapterVersion | None:
    """The version of a name that has exactly this digest."""
    return find_version(connection, tenant, Reference(name, digest_prefix=digest))


def find_record(connection: Connection, tenant: str, name: str) -> AdapterRecord | None:
    """An adapter with all of its versions and tags, or None."""
    records = _records(connection, _adapters(tenant).where(_names.c.name == name), tenant)
    return records[0] if records else None


def present_digests(connection: Connection, digests: Collection[str]) -> set[str]:
    """Those that some tenant has a version of."""
    return {
        digest
        for some in _chunks(digests)
        for (digest,) in connection.execute(select(_versions.c.digest).where(_versions.c.digest.in_(some)).distinct())
    }


def find_digests(connection: Connection, digests: Collection[str]) -> list[AdapterVersion]:
    """All versions of all tenants with these digests."""
    found = []
    for some in _chunks(digests):
        query = select(_versions.c.tenant, _versions.c.name, _versions.c.number).where(_versions.c.digest.in_(some))
        for tenant, name, number in connection.execute(query.order_by(*query.selected_columns)).all():
            version = find_version(connection, tenant, Reference(name, number=number))
            assert version is not None, "one transaction sees one state"
            found.append(version)
    return found


def page(connection: Connection, tenant: str, limit: int, after: str) -> tuple[AdapterRecord, ...]:
    """Up to ``limit`` adapters in the order of their names' bytes, those after ``after``."""
    return _records(connection, _adapters(tenant).where(_names.c.name > after).limit(limit), tenant)


def listed(connection: Connection, tenant: str, limit: int, after: str) -> tuple[Listed, ...]:
    """Up to ``limit`` adapters and aliases in the order of their names' bytes, those after ``after``. One statement, and no files."""
    here = and_(_tags.c.tenant == _names.c.tenant, _tags.c.name == _names.c.name, _tags.c.tag == LATEST)
    source = _names.outerjoin(_tags, here).outerjoin(
        _versions, and_(*(_versions.c[key] == _tags.c[key] for key in ("tenant", "name", "number")))
    )
    query = select(_names.c.name, _versions.c.created).select_from(source).where(_names.c.tenant == tenant, _names.c.name > after)
    return tuple(Listed(*row) for row in connection.execute(query.order_by(_names.c.name).limit(limit)))


def not_found(name: str) -> AdapterNotFound:
    """The same words for what is not there and what is somebody else's."""
    return AdapterNotFound(
        f"there is no adapter {name!r}, or no such version or tag of it; push it, or list yours with GET /v1/adapters"
    )


def _chunks(digests: Collection[str]) -> Iterator[list[str]]:
    wanted = sorted(digests)
    for start in range(0, len(wanted), _MAX_IN):
        yield wanted[start : start + _MAX_IN]


def _adapters(tenant: str) -> Select[Any]:
    return select(_names).where(_names.c.tenant == tenant, _names.c.kind == schema.ADAPTER).order_by(_names.c.name)


def _records(connection: Connection, query: Select[Any], tenant: str) -> tuple[AdapterRecord, ...]:
    found = connection.execute(query).all()
    if not found:
        return ()
    span = {"tenant": tenant, "first": found[0].name, "last": found[-1].name}
    files: dict[tuple[str, int], list[VersionFile]] = {}
    for name, number, *file in connection.execute(_PAGE_FILES, span):
        files.setdefault((name, number), []).append(VersionFile(*file))
    versions: dict[str, list[AdapterVersion]] = {}
    for row in connection.execute(_PAGE_VERSIONS, span):
        versions.setdefault(row.name, []).append(_version(row, files[row.name, row.number]))
    tags: dict[str, dict[str, int]] = {}
    for name, tag, number in connection.execute(_PAGE_TAGS, span):
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
