"""Which blobs there are, which tenant owns which, and which nobody needs. Knows no bytes.

A blob's row is written before its bytes and goes in the same transaction as these, so that no upload loses a blob to a sweep:
an upload that finds the row keeps it from being swept for an hour, one that waits for a sweep finds the row gone and uploads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from sqlalchemy import ColumnElement, Connection, and_, delete, exists, or_, select, update

from adapter_store.database import Database
from adapter_store.errors import StoreUnavailable
from adapter_store.schema import blob_owners, blobs, files

UNTOUCHED_S = 3600.0
"""How long a blob is kept that nobody needs: longer than any upload takes from its first blob to its version."""
OWNED_S = 24 * 3600.0
"""How long a tenant owns what it uploaded and put into no version."""


class BlobRecords:
    """The rows about blobs. Thread-safe."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def note(self, sha256: str, nbytes: int) -> bool:
        """Say that a blob is about to be stored. True when there was no such row: then its bytes must be stored in any case."""
        now = self._database.now()
        with self._database.write() as connection:
            touched = update(blobs).where(blobs.c.sha256 == sha256).values(touched=now)
            if connection.execute(touched).rowcount:
                return False
            # Two at once may both get here and both store the bytes: once too often, never once too few.
            insert = self._database.insert(blobs).values(sha256=sha256, nbytes=nbytes, touched=now)
            connection.execute(insert.on_conflict_do_update(index_elements=["sha256"], set_={"touched": now}))
            return True

    def own(self, tenant: str, sha256: str) -> None:
        """Make a tenant own a stored blob for the next 24 hours."""
        until = self._database.now() + OWNED_S
        with self._database.write() as connection:
            self.hold(connection, [sha256])
            insert = self._database.insert(blob_owners).values(tenant=tenant, sha256=sha256, until=until)
            connection.execute(insert.on_conflict_do_update(index_elements=["tenant", "sha256"], set_={"until": until}))

    def size(self, tenant: str, sha256: str) -> int | None:
        """The bytes of a blob that the tenant owns. None for all others, whether they are stored or not."""
        query = select(blobs.c.nbytes).where(blobs.c.sha256 == sha256, or_(*self._owned(tenant)))
        with self._database.read() as connection:
            return connection.execute(query).scalar()

    def hold(self, connection: Connection, wanted: Iterable[str]) -> None:
        """Within a write: keep blobs from being swept until it ends. Raises StoreUnavailable when one is gone already."""
        sought = sorted(set(wanted))
        query = select(blobs.c.sha256).where(blobs.c.sha256.in_(sought)).order_by(blobs.c.sha256)
        if len(connection.execute(query.with_for_update(read=True, key_share=True)).all()) < len(sought):
            raise StoreUnavailable(
                f"the upload took more than {UNTOUCHED_S:.0f} s, and some of its files were swept; send it again"
            )

    def orphans(self) -> list[str]:
        """Blobs that nobody needs now."""
        with self._database.read() as connection:
            return list(connection.execute(select(blobs.c.sha256).where(self._orphaned())).scalars())

    def remove(self, sha256: str, remove_bytes: Callable[[str], None]) -> bool:
        """Remove a blob's row and bytes, if it is still an orphan. Who wants to store it meanwhile waits until both are gone."""
        with self._database.write() as connection:
            # Whoever is about to use the blob holds its row; only what is read after that has ended counts.
            if connection.execute(select(blobs.c.sha256).where(blobs.c.sha256 == sha256).with_for_update()).first() is None:
                return False  # another sweep was faster; a row that somebody makes from now on is not locked
            gone = connection.execute(delete(blobs).where(blobs.c.sha256 == sha256, self._orphaned())).rowcount == 1
            if gone:
                remove_bytes(sha256)
            return gone

    def take_over(self, stored: Callable[[], Iterable[str]], size_of: Callable[[str], int | None]) -> None:
        """Complete the rows of a store that was made before there were any: the sizes of the blobs that its versions name, and
        rows for blobs that nobody needs. ``stored`` gives the digests of all blobs. Does nothing to any other store."""
        with self._database.read() as connection:
            if connection.execute(select(blobs.c.sha256).where(blobs.c.nbytes.is_(None)).limit(1)).first() is None:
                return
        now = self._database.now()
        rows = [{"sha256": sha256, "nbytes": size_of(sha256), "touched": now} for sha256 in stored()]
        with self._database.write() as connection:
            insert = self._database.insert(blobs)
            sized = insert.on_conflict_do_update(index_elements=["sha256"], set_={"nbytes": insert.excluded.nbytes})
            if rows:
                connection.execute(sized, sorted(rows, key=lambda row: str(row["sha256"])))
            # What is not stored is found out by who wants it; its size is not worth looking for at every start.
            connection.execute(update(blobs).where(blobs.c.nbytes.is_(None)).values(nbytes=0))

    def expire(self) -> None:
        """Forget ownerships that have ended."""
        with self._database.write() as connection:
            connection.execute(delete(blob_owners).where(blob_owners.c.until <= self._database.now()))

    def _owned(self, tenant: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
        in_a_version = exists().where(files.c.sha256 == blobs.c.sha256, files.c.tenant == tenant)
        uploaded = exists().where(
            blob_owners.c.sha256 == blobs.c.sha256, blob_owners.c.tenant == tenant, blob_owners.c.until > self._database.now()
        )
        return in_a_version, uploaded

    def _orphaned(self) -> ColumnElement[bool]:
        now = self._database.now()
        return and_(
            blobs.c.touched <= now - UNTOUCHED_S,
            ~exists().where(files.c.sha256 == blobs.c.sha256),
            ~exists().where(blob_owners.c.sha256 == blobs.c.sha256, blob_owners.c.until > now),
        )
