"""The SQL database behind the catalog: SQLite or PostgreSQL, and transactions that read or write. Knows no table.

A read sees one state of the database for as long as it lasts. It never waits for a write, nor a write for it. A write is seen
whole or not at all. Writes follow one another in SQLite; in PostgreSQL they run side by side (READ COMMITTED) and lock the
rows that they decide on.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Connection, Engine, Table, create_engine, event, func, make_url, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from adapter_store.errors import StorageFull, StoreError, StoreUnavailable

_WAIT_MS = 10_000
_POSTGRES_DISK_FULL = "53100"


class Database:
    """One database and its connections. Thread-safe. ``clock`` tells the seconds since the epoch."""

    def __init__(self, url: str | URL, clock: Callable[[], float] = time.time) -> None:
        self.now = clock
        self._engine = _create(url)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        if self._is_sqlite:
            _configure_sqlite(self._engine)
            self._reading = self._engine
        else:
            self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._writing = self._engine.execution_options(writes=True)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that changes nothing. Raises StoreUnavailable."""
        with _translated(), self._reading.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is committed at the end, or undone by an exception. Raises StoreUnavailable, StorageFull."""
        with _translated(), self._writing.begin() as connection:
            yield connection

    def insert(self, table: Table) -> sqlite.Insert | postgresql.Insert:
        """An INSERT that can say what to do when the row is there already (``on_conflict_do_…``)."""
        return sqlite.insert(table) if self._is_sqlite else postgresql.insert(table)

    def serialize(self, connection: Connection, what: str) -> None:
        """Within a write: wait until no other write is in its part called ``what``; others wait until this one ends."""
        if not self._is_sqlite:  # SQLite's writes follow one another anyway
            connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(what, 0))))

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _create(text: str | URL) -> Engine:
    try:
        url = make_url(text)
    except ArgumentError as error:
        raise StoreError("the catalog's URL cannot be read; it starts with sqlite:/// or postgresql+psycopg://") from error
    # As many connections as there are threads of asyncio.to_thread, so that slow writes never starve reads.
    pool = {"pool_size": 8, "max_overflow": 24, "pool_timeout": _WAIT_MS / 1000}
    if url.drivername == "sqlite":
        return create_engine(url, **pool)
    if url.drivername == "postgresql+psycopg":
        return create_engine(url, **pool, pool_pre_ping=True, connect_args={"connect_timeout": 5})
    raise StoreError(f"the catalog cannot be kept in {url.drivername!r}; give a URL of sqlite:/// or postgresql+psycopg://")


def _configure_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        # Transactions are begun below, not by the driver: it would begin them too late, and not for reads.
        connection.isolation_level = None
        for pragma in (f"busy_timeout={_WAIT_MS}", "journal_mode=WAL", "foreign_keys=ON", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        # A writer takes its lock before it reads, or it could find later that what it read has changed.
        writes = connection.get_execution_options().get("writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeout) as error:
        if isinstance(error, DBAPIError) and _is_full(error.orig):
            raise StorageFull("no space is left to write the catalog") from error
        raise StoreUnavailable("the catalog cannot be reached, or is too busy; try again") from error


def _is_full(error: object) -> bool:
    return (
        getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or getattr(error, "sqlstate", None) == _POSTGRES_DISK_FULL
    )
