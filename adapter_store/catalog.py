"""The catalog: which tenant has which adapter names, and which version each name means. SQLAlchemy Core, SQLite by default."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Float,
    ForeignKeyConstraint,
    Integer,
    MetaData,
    Row,
    String,
    Table,
    Text,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import OperationalError

from adapter_store.errors import AdapterNotFound, StoreUnavailable
from adapter_store.manifest import Reference

_metadata = MetaData()
_adapters = Table(
    "adapters",
    _metadata,
    Column("tenant", String(128), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("latest", Integer, nullable=False),
    Column("next_number", Integer, nullable=False),
)
_versions = Table(
    "versions",
    _metadata,
    Column("tenant", String(128), primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("digest", String(71), nullable=False),
    Column("created", Float, nullable=False),
    Column("nbytes", Integer, nullable=False),
    Column("blobs", Text, nullable=False),
    Column("facts", Text, nullable=False),
    ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"], ondelete="CASCADE"),
)


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version of a name. ``created`` is in seconds since the epoch; ``blobs`` maps roles to sha256."""

    tenant: str
    name: str
    number: int
    digest: str
    created: float
    nbytes: int
    blobs: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A name with all of its versions, newest first. ``latest`` is the one that the bare name means."""

    tenant: str
    name: str
    latest: AdapterVersion
    versions: tuple[AdapterVersion, ...]


class Catalog:
    """Names and versions, one transaction per change. Thread-safe."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url)
        if self._engine.dialect.name == "sqlite":
            _configure_sqlite(self._engine)
        _metadata.create_all(self._engine)

    def close(self) -> None:
        self._engine.dispose()

    def publish(
        self, tenant: str, name: str, digest: str, nbytes: int, blobs: dict[str, str], facts: dict[str, Any]
    ) -> AdapterVersion:
        """Make ``digest`` what the name means: a new version, or the existing one with the same digest."""
        try:
            with self._engine.begin() as connection:
                return self._publish(connection, tenant, name, digest, nbytes, blobs, facts)
        except OperationalError as error:
            raise StoreUnavailable("the catalog cannot be written now; try again") from error

    def resolve(self, tenant: str, reference: Reference) -> AdapterVersion:
        """The version that a reference means for this tenant. Raises AdapterNotFound."""
        query = select(_versions).where(_versions.c.tenant == tenant, _versions.c.name == reference.name)
        if reference.number is not None:
            query = query.where(_versions.c.number == reference.number)
        elif reference.digest_prefix is not None:
            query = query.where(_versions.c.digest.startswith(reference.digest_prefix, autoescape=True))
        else:
            query = query.join(_adapters).where(_versions.c.number == _adapters.c.latest)
        with self._engine.connect() as connection:
            rows = connection.execute(query).all()
        if len({row.digest for row in rows}) != 1:
            raise _not_found(reference.name)
        return _version(rows[0])

    def get(self, tenant: str, name: str) -> AdapterRecord:
        """A name with all of its versions. Raises AdapterNotFound."""
        records = self._records(tenant, _adapters.c.name == name, 1)
        if not records:
            raise _not_found(name)
        return records[0]

    def records(self, tenant: str, limit: int, after: str) -> tuple[AdapterRecord, ...]:
        """Up to ``limit`` names in alphabetical order, those after ``after``."""
        return self._records(tenant, _adapters.c.name > after, limit)

    def remove(self, tenant: str, reference: Reference) -> list[AdapterVersion]:
        """Remove a name, or one version of it; the newest one left becomes the latest. Returns what was removed."""
        with self._engine.begin() as connection:
            rows = connection.execute(
                select(_versions).where(_versions.c.tenant == tenant, _versions.c.name == reference.name)
            ).all()
            gone = [row for row in rows if _matches(row, reference)]
            if not gone:
                raise _not_found(reference.name)
            numbers = [row.number for row in gone]
            here = (_versions.c.tenant == tenant) & (_versions.c.name == reference.name)
            connection.execute(delete(_versions).where(here, _versions.c.number.in_(numbers)))
            left = [row.number for row in rows if row.number not in numbers]
            name = (_adapters.c.tenant == tenant) & (_adapters.c.name == reference.name)
            if left:
                connection.execute(update(_adapters).where(name).values(latest=max(left)))
            else:
                connection.execute(delete(_adapters).where(name))
        return [_version(row) for row in gone]

    def used_blobs(self) -> set[str]:
        """Every blob that some version names."""
        with self._engine.connect() as connection:
            return {sha256 for (text,) in connection.execute(select(_versions.c.blobs)) for sha256 in json.loads(text).values()}

    def digests(self) -> set[str]:
        """The digests of all versions of all tenants."""
        with self._engine.connect() as connection:
            return set(connection.execute(select(_versions.c.digest).distinct()).scalars())

    def has_digest(self, digest: str) -> bool:
        """Whether any tenant has a version with this digest."""
        with self._engine.connect() as connection:
            return connection.execute(select(_versions.c.number).where(_versions.c.digest == digest).limit(1)).first() is not None

    def names_of(self, digests: Collection[str]) -> dict[str, list[AdapterVersion]]:
        """All versions of all tenants with these digests, by digest."""
        wanted = select(_versions).where(_versions.c.digest.in_(digests)).order_by(_versions.c.tenant, _versions.c.name)
        found: dict[str, list[AdapterVersion]] = {}
        with self._engine.connect() as connection:
            for row in connection.execute(wanted):
                found.setdefault(row.digest, []).append(_version(row))
        return found

    def count(self) -> int:
        """Names over all tenants."""
        with self._engine.connect() as connection:
            return int(connection.execute(select(func.count()).select_from(_adapters)).scalar_one())

    def _publish(
        self,
        connection: Connection,
        tenant: str,
        name: str,
        digest: str,
        nbytes: int,
        blobs: dict[str, str],
        facts: dict[str, Any],
    ) -> AdapterVersion:
        here = (_adapters.c.tenant == tenant) & (_adapters.c.name == name)
        row = connection.execute(select(_adapters).where(here)).first()
        if row is None:
            connection.execute(insert(_adapters).values(tenant=tenant, name=name, latest=1, next_number=1))
        number = 1 if row is None else int(row.next_number)
        same = connection.execute(
            select(_versions).where(_versions.c.tenant == tenant, _versions.c.name == name, _versions.c.digest == digest)
        ).first()
        if same is not None:
            connection.execute(update(_adapters).where(here).values(latest=same.number))
            return _version(same)
        version = AdapterVersion(tenant, name, number, digest, time.time(), nbytes, blobs, facts)
        connection.execute(
            insert(_versions).values(
                tenant=tenant,
                name=name,
                number=number,
                digest=digest,
                created=version.created,
                nbytes=nbytes,
                blobs=json.dumps(blobs),
                facts=json.dumps(facts),
            )
        )
        connection.execute(update(_adapters).where(here).values(latest=number, next_number=number + 1))
        return version

    def _records(self, tenant: str, condition: Any, limit: int) -> tuple[AdapterRecord, ...]:
        names = select(_adapters).where(_adapters.c.tenant == tenant, condition).order_by(_adapters.c.name).limit(limit)
        with self._engine.connect() as connection:
            adapters = connection.execute(names).all()
            rows = connection.execute(
                select(_versions)
                .where(_versions.c.tenant == tenant, _versions.c.name.in_([row.name for row in adapters]))
                .order_by(_versions.c.number.desc())
            ).all()
        grouped: dict[str, list[AdapterVersion]] = {}
        for row in rows:
            grouped.setdefault(row.name, []).append(_version(row))
        return tuple(
            AdapterRecord(
                tenant, row.name, next(item for item in grouped[row.name] if item.number == row.latest), tuple(grouped[row.name])
            )
            for row in adapters
        )


def _configure_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        # SQLAlchemy begins transactions itself (below), so that a writer takes its lock before it reads.
        connection.isolation_level = None
        for pragma in ("journal_mode=WAL", "foreign_keys=ON", "busy_timeout=10000", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _matches(row: Row[Any], reference: Reference) -> bool:
    if reference.number is not None:
        return bool(row.number == reference.number)
    return reference.digest_prefix is None or bool(row.digest.startswith(reference.digest_prefix))


def _version(row: Row[Any]) -> AdapterVersion:
    return AdapterVersion(
        row.tenant, row.name, row.number, row.digest, row.created, row.nbytes, json.loads(row.blobs), json.loads(row.facts)
    )


def _not_found(name: str) -> AdapterNotFound:
    return AdapterNotFound(
        f"there is no adapter {name!r}, or no such version of it; push it, or list yours with GET /v1/adapters"
    )
