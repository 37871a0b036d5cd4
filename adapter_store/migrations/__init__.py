"""The history of the catalog's tables: what a database of any age needs to become what schema says, and the way back.

Runs when a catalog is opened. Several replicas may open at once: one migrates, the others wait and find nothing to do.
"""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, inspect, text

from adapter_store.database import Database
from adapter_store.errors import StoreError

HEAD = "0002"
"""The revision that this code works with."""
_FIRST = "0001"


def upgrade(database: Database) -> None:
    """Bring the tables to HEAD. Raises StoreError when they are newer than this code, StoreUnavailable."""
    with database.read() as connection:
        if _revision(connection) == HEAD:
            return
    with database.migrate() as connection:
        database.serialize(connection, "migrations")
        if _revision(connection) is None and inspect(connection).has_table("adapters"):
            command.stamp(_config(connection), _FIRST)  # made before there were migrations
        try:
            command.upgrade(_config(connection), HEAD)
        except CommandError as error:
            found = f"the catalog's tables are of revision {_revision(connection)}, and this server knows up to {HEAD}"
            raise StoreError(f"{found}; start the newer version, or let it migrate them back first") from error


def downgrade(database: Database, revision: str) -> None:
    """Bring the tables back to an older revision, for an older server. What it has no place for is lost: 0001 knows neither
    aliases, tags other than ``latest``, pins, nor files' names."""
    with database.migrate() as connection:
        database.serialize(connection, "migrations")
        command.downgrade(_config(connection), revision)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return revision


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
