"""Replies to requests that carry an idempotency key: a repeated request gets the reply of the first and changes nothing.

A reply is stored in the transaction of the change that it reports, so that either both are there or neither is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from sqlalchemy import Connection, delete, select, update

from adapter_store.database import Database
from adapter_store.schema import replies
from adapter_store.types import Replay

LIFETIME_S = 24 * 3600.0


def publish_fingerprint(name: str, tag: str, blobs: Mapping[str, str]) -> str:
    """What a publish asks for: name, tag and the uploaded files' sha256 by role. What a fusion's children are by now is not part of it."""
    uploaded = {role: sha256 for role, sha256 in blobs.items() if not role.startswith("child/")}
    return hashlib.sha256(json.dumps([name, tag, uploaded], sort_keys=True).encode()).hexdigest()


class Idempotency:
    """The stored replies of all tenants. Keys may be any text; only their hashes are kept."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def replay(self, tenant: str, key: str) -> Replay | None:
        """The reply stored under a key in the last 24 hours, or None."""
        with self._database.read() as connection:
            return self._find(connection, tenant, key)

    def claim(self, connection: Connection, tenant: str, key: str, fingerprint: str) -> Replay | None:
        """Start a transaction that ends with ``store``. When a reply is there already it comes back, and nothing is to be done.

        Waits for another transaction with the same key. Raises IdempotencyKeyReused when that was for something else.
        """
        here = (replies.c.tenant == tenant) & (replies.c.key == _hashed(key))
        now = self._database.now()
        connection.execute(delete(replies).where(here, replies.c.created <= now - LIFETIME_S))
        row = {"tenant": tenant, "key": _hashed(key), "fingerprint": fingerprint, "status": 0, "body": "", "created": now}
        claimed = self._database.insert(replies).values(row).on_conflict_do_nothing().returning(replies.c.key)
        if connection.execute(claimed).first() is not None:
            return None
        found = select(replies.c.fingerprint, replies.c.status, replies.c.body).where(here)
        return Replay(*connection.execute(found).one()).to(fingerprint)

    def store(self, connection: Connection, tenant: str, key: str, status: int, body: str) -> None:
        """Put the reply under the key that this transaction has claimed."""
        here = (replies.c.tenant == tenant) & (replies.c.key == _hashed(key))
        connection.execute(update(replies).where(here).values(status=status, body=body))

    def expire(self) -> None:
        """Forget what is older than 24 hours."""
        with self._database.write() as connection:
            connection.execute(delete(replies).where(replies.c.created <= self._database.now() - LIFETIME_S))

    def _find(self, connection: Connection, tenant: str, key: str) -> Replay | None:
        young = replies.c.created > self._database.now() - LIFETIME_S
        query = select(replies.c.fingerprint, replies.c.status, replies.c.body).where(
            replies.c.tenant == tenant, replies.c.key == _hashed(key), young
        )
        row = connection.execute(query).first()
        return None if row is None else Replay(*row)


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
