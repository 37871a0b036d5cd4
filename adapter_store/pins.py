"""Pins: the adapters that a tenant wants to stay on the device. Knows nothing of devices; who reads this acts on it."""

from __future__ import annotations

from sqlalchemy import delete, func, select

from adapter_store import lookup
from adapter_store.database import Database
from adapter_store.errors import PinLimit
from adapter_store.schema import pins, versions

MAX_PINS = 16
"""How many adapters one tenant may pin."""


class Pins:
    """The pins of all tenants, by digest. Thread-safe."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, tenant: str, digest: str) -> bool:
        """Pin what the tenant has. False when it was pinned already. Raises AdapterNotFound, PinLimit."""
        with self._database.write() as connection:
            # What is pinned must not be removed meanwhile. A removal, too, holds its versions before it comes to the pins.
            has = select(versions.c.number).where(versions.c.tenant == tenant, versions.c.digest == digest)
            if connection.execute(has.with_for_update(read=True, key_share=True)).first() is None:
                raise lookup.not_found(digest)
            # Counting and adding must not be divided by another pin of the tenant.
            self._database.serialize(connection, f"pins of {tenant}")
            others = select(func.count()).select_from(pins).where(pins.c.tenant == tenant, pins.c.digest != digest)
            if connection.execute(others).scalar_one() >= MAX_PINS:
                raise PinLimit(f"at most {MAX_PINS} adapters can be pinned; unpin another first")
            insert = self._database.insert(pins).values(tenant=tenant, digest=digest).on_conflict_do_nothing()
            return connection.execute(insert.returning(pins.c.digest)).first() is not None

    def remove(self, tenant: str, digest: str) -> None:
        """Unpin; what is not pinned is no error."""
        with self._database.write() as connection:
            connection.execute(delete(pins).where(pins.c.tenant == tenant, pins.c.digest == digest))

    def all(self) -> set[tuple[str, str]]:
        """(tenant, digest) of every pin."""
        with self._database.read() as connection:
            return {(row.tenant, row.digest) for row in connection.execute(select(pins))}
