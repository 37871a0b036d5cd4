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
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen
from psycopg.pq import TransactionStatus
from sqlalchemy import URL, Connection, Engine, NullPool, Table, create_engine, event, func, make_url, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from adapter_store.errors import StorageFull, StoreError, StoreUnavailable

MAX_CONNECTIONS = 32
"""Connections at once. With as many threads, slow writes never starve reads."""
_WAIT_MS = 10_000
_STATEMENT_MS = 10_000
"""How long PostgreSQL may work on one statement."""
_LOCK_MS = 5_000
"""How long a statement may wait there for another transaction."""
_CONNECT_S = 5
_SILENCE_S = 12.0
"""After how long without an answer a connection is given up: more than a statement may take."""
_POSTGRES_DISK_FULL = "53100"

T = TypeVar("T")


class Database:
    """One database and its connections. Thread-safe. ``clock`` tells the seconds since the epoch."""

    def __init__(self, url: str | URL, clock: Callable[[], float] = time.time) -> None:
        self.now = clock
        self._url = _parsed(url)
        self._engine = _create(self._url)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        if self._is_sqlite:
            _configure_sqlite(self._engine)
            self._looking, self._reading = self._engine, self._engine.execution_options(begin="BEGIN")
        else:
            self._looking = self._engine.execution_options(isolation_level="AUTOCOMMIT")
            self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._writing = self._engine.execution_options(begin="BEGIN IMMEDIATE")

    @contextmanager
    def look(self) -> Iterator[Connection]:
        """For one statement that reads, which sees one state by itself: without the cost of a transaction. Raises StoreUnavailable."""
        with _translated(), self._looking.connect() as connection:
            yield connection

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

    @contextmanager
    def migrate(self) -> Iterator[Connection]:
        """A write that may take as long as it needs, where others end in StoreUnavailable: for changes of the tables."""
        if self._is_sqlite:
            with self.write() as connection:
                yield connection
            return
        patient = create_engine(self._url, poolclass=NullPool, connect_args={"connect_timeout": _CONNECT_S})
        with _translated(), patient.begin() as connection:
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


class _BoundedConnection(psycopg.Connection[Any]):
    """Gives up on a server that is silent although its machine is there: a stopped process, a disk that hangs."""

    def wait(self, gen: PQGen[T], interval: float = 0.1, timeout: float | None = None) -> T:
        try:
            return super().wait(gen, interval, timeout=_SILENCE_S if timeout is None else timeout)
        except psycopg.OperationalError:
            # Without an answer to its statement the connection is of no use, not even to undo anything.
            if self.pgconn.transaction_status == TransactionStatus.ACTIVE:
                self.pgconn.finish()
            raise


def _parsed(url: str | URL) -> URL:
    try:
        return make_url(url)
    except ArgumentError as error:
        raise StoreError("the catalog's URL cannot be read; it starts with sqlite:/// or postgresql+psycopg://") from error


def _create(url: URL) -> Engine:
    # A few connections stay, the others are closed after use.
    pool = {"pool_size": 8, "max_overflow": MAX_CONNECTIONS - 8, "pool_timeout": _WAIT_MS / 1000}
    if url.drivername == "sqlite":
        return create_engine(url, **pool)
    if url.drivername == "postgresql+psycopg":
        engine = create_engine(url, **pool, pool_pre_ping=True, connect_args=_limits(url))
        event.listen(engine, "do_connect", lambda _dialect, _record, args, kwargs: _BoundedConnection.connect(*args, **kwargs))
        return engine
    raise StoreError(f"the catalog cannot be kept in {url.drivername!r}; give a URL of sqlite:/// or postgresql+psycopg://")


def _limits(url: URL) -> dict[str, Any]:
    """How long to wait for a server that is slow, or a machine that is gone. What the URL says itself goes before these."""
    options = f"-c statement_timeout={_STATEMENT_MS} -c lock_timeout={_LOCK_MS} {url.query.get('options', '')}"
    limits = {"connect_timeout": _CONNECT_S, "tcp_user_timeout": _STATEMENT_MS}
    limits |= {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
    return {"options": options, **{name: value for name, value in limits.items() if name not in url.query}}


def _configure_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _record: Any) -> None:
        # Transactions are begun below, not by the driver: it would begin them too late, and not for reads.
        connection.isolation_level = None
        for pragma in (f"busy_timeout={_WAIT_MS}", "foreign_keys=ON", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")
        _write_ahead(connection)

    @event.listens_for(engine, "begin")
    def _on_begin(connection: Connection) -> None:
        # A writer takes its lock before it reads, or it could find later that what it read has changed.
        begin = connection.get_execution_options().get("begin")
        if begin is not None:
            connection.exec_driver_sql(begin)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Where several open a new database at once, SQLite refuses this to all but one of them, however long they are ready to wait."""
    until = time.monotonic() + _WAIT_MS / 1000
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


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
