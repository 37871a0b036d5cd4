"""How long a database may take: connections for every thread, and a PostgreSQL that is slow, locked or silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest

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
    for name, value in (("_STATEMENT_MS", 1000), ("_LOCK_MS", 200), ("_CONNECT_S", 2), ("_SILENCE_S", 1.5)):
        monkeypatch.setattr(module, name, value)
    found = Database(postgres_server)
    yield found
    found.close()


@contextmanager
def unavailable_within(seconds: float) -> Iterator[None]:
    started = time.monotonic()
    with pytest.raises(StoreUnavailable):
        yield
    assert time.monotonic() - started < seconds


def test_every_thread_has_a_connection(database: Database) -> None:
    barrier = threading.Barrier(MAX_CONNECTIONS)

    def read(_: int) -> int:
        with database.read() as connection:
            barrier.wait(5)
            return int(connection.exec_driver_sql("SELECT 1").scalar_one())

    with ThreadPoolExecutor(MAX_CONNECTIONS) as pool:
        assert sum(pool.map(read, range(MAX_CONNECTIONS))) == MAX_CONNECTIONS


def test_a_slow_statement_is_cut_and_a_migration_is_not(hasty: Database) -> None:
    with unavailable_within(3), hasty.read() as connection:
        connection.exec_driver_sql("SELECT pg_sleep(5)")
    with hasty.migrate() as connection:
        connection.exec_driver_sql("SELECT pg_sleep(2)")


def test_who_waits_for_a_lock_is_told_so(hasty: Database) -> None:
    with hasty.write() as connection:
        hasty.serialize(connection, "x")
        with unavailable_within(0.9), hasty.write() as other:
            hasty.serialize(other, "x")
    with hasty.write() as connection:
        hasty.serialize(connection, "x")


def test_a_silent_server_is_unavailable_and_comes_back(hasty: Database, postgres_server: str) -> None:
    with hasty.look() as connection:
        connection.exec_driver_sql("SELECT 1")
    with silent(postgres_server):
        # The pooled connection does not answer, and neither does a new one.
        with unavailable_within(5), hasty.look():
            pass
        with unavailable_within(3), hasty.write():
            pass
    with hasty.write() as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1


def test_a_server_that_falls_silent_within_a_transaction(hasty: Database, postgres_server: str) -> None:
    with unavailable_within(5), hasty.write() as connection:
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
