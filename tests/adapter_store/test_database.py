"""How long a database may take: connections for every thread, and a PostgreSQL that is slow, locked or silent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.errors import ConnectionTimeout, LockNotAvailable, OperationalError, QueryCanceled
from sqlalchemy.exc import DBAPIError

from adapter_store import database as module
from adapter_store.database import MAX_CONNECTIONS, Database
from adapter_store.errors import StoreUnavailable
from tests.postgres import silent


@pytest.fixture
def database(catalog_url: str) -> Iterator[Database]:
    found = Database(catalog_url)
    yield found
    found.close()


@pytest.fixture
def hasty(postgres_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    """PostgreSQL with much less patience than usual."""
    for name, value in (("_STATEMENT_MS", 500), ("_LOCK_MS", 200), ("_CONNECT_S", 2), ("_SILENCE_S", 1.0)):
        monkeypatch.setattr(module, name, value)
    found = Database(postgres_server)
    yield found
    found.close()


@contextmanager
def unavailable(why: type[psycopg.Error]) -> Iterator[None]:
    """For a reason that PostgreSQL, or its client, gives."""
    with pytest.raises(StoreUnavailable) as caught:
        yield
    assert isinstance(caught.value.__cause__, DBAPIError)
    assert isinstance(caught.value.__cause__.orig, why)


def test_every_thread_has_a_connection(database: Database) -> None:
    barrier = threading.Barrier(MAX_CONNECTIONS)

    def read(_: int) -> int:
        with database.read() as connection:
            barrier.wait(60)
            return int(connection.exec_driver_sql("SELECT 1").scalar_one())

    with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        assert sum(pool.map(read, range(MAX_CONNECTIONS))) == MAX_CONNECTIONS


def test_a_slow_statement_is_cut_and_a_migration_is_not(hasty: Database) -> None:
    with unavailable(QueryCanceled), hasty.read() as connection:
        connection.exec_driver_sql("SELECT pg_sleep(60)")
    with hasty.migrate() as connection:
        connection.exec_driver_sql("SELECT pg_sleep(1.2)")


def test_who_waits_for_a_lock_is_told_so(hasty: Database) -> None:
    with hasty.write() as connection:
        hasty.serialize(connection, "x")
        with unavailable(LockNotAvailable), hasty.write() as other:
            hasty.serialize(other, "x")
    with hasty.write() as connection:
        hasty.serialize(connection, "x")


def test_a_silent_server_is_unavailable_and_comes_back(hasty: Database, postgres_server: str) -> None:
    with hasty.look() as connection:
        connection.exec_driver_sql("SELECT 1")
    with silent(postgres_server):
        # The pooled connection does not answer, and neither does a new one.
        with unavailable(ConnectionTimeout), hasty.look():
            pass
        with unavailable(ConnectionTimeout), hasty.write():
            pass
    with hasty.write() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1


def test_a_server_that_falls_silent_within_a_transaction(hasty: Database, postgres_server: str) -> None:
    with unavailable(OperationalError), hasty.write() as connection:
        connection.exec_driver_sql("SELECT 1")
        with silent(postgres_server):
            connection.exec_driver_sql("SELECT 1")
    with hasty.look() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1


def test_what_the_url_says_itself_stays(postgres_server: str) -> None:
    database = Database(postgres_server + "&connect_timeout=3&options=-c%20lock_timeout%3D7s%20-c%20search_path%3Dother")
    with database.look() as connection:
        shown = [
            connection.exec_driver_sql(f"SHOW {name}").scalar() for name in ("statement_timeout", "lock_timeout", "search_path")
        ]
        given = connection.connection.driver_connection
        assert isinstance(given, psycopg.Connection)
        assert given.info.get_parameters()["connect_timeout"] == "3"
    assert shown == ["10s", "7s", "other"]
    database.close()
