"""The rows of names: taking one, locking it, and whether it is in the state that a caller expects. Knows no versions, tags or targets.

Whoever changes what a name means holds its row until the change is committed; so changes of one name follow one another.
"""

from __future__ import annotations

import secrets
from typing import Any

from sqlalchemy import Connection, Row, select, update

from adapter_store.database import Database
from adapter_store.errors import NameTaken, PreconditionFailed
from adapter_store.schema import names
from adapter_store.types import Condition


def take(database: Database, connection: Connection, tenant: str, name: str, kind: str, condition: Condition) -> Row[Any]:
    """The row of a name, locked; a new one if there was none. Raises NameTaken, PreconditionFailed."""
    fresh = new_etag()
    row = {"tenant": tenant, "name": name, "kind": kind, "etag": fresh, "next_number": 1}
    insert = database.insert(names).values(row)
    # Setting what is there already is how one statement either makes the row or locks it.
    insert = insert.on_conflict_do_update(index_elements=["tenant", "name"], set_={"name": insert.excluded.name})
    found = connection.execute(insert.returning(names)).one()
    if found.etag == fresh:
        if condition.match is not None:
            raise PreconditionFailed(f"there is no {name!r}; it was expected to have etag {condition.match[:80]!r}")
        return found
    check(condition, found)
    if found.kind != kind:
        raise NameTaken(f"{name!r} is an {found.kind}; choose another name, or remove it first")
    return found


def lock(connection: Connection, tenant: str, name: str, kind: str) -> Row[Any] | None:
    """The row of an existing name of this kind, locked, or None."""
    query = select(names).where(names.c.tenant == tenant, names.c.name == name, names.c.kind == kind)
    return connection.execute(query.with_for_update()).first()


def keep(connection: Connection, tenant: str, wanted: list[str]) -> dict[str, str]:
    """The kinds of those names that exist; until the transaction ends none of them can be removed."""
    query = select(names.c.name, names.c.kind).where(names.c.tenant == tenant, names.c.name.in_(wanted)).order_by(names.c.name)
    return {row.name: row.kind for row in connection.execute(query.with_for_update(read=True, key_share=True))}


def check(condition: Condition, row: Row[Any]) -> None:
    """Raises PreconditionFailed when a row that exists is not to be there, or has another etag than expected. ``*`` is any."""
    if condition.absent:
        raise PreconditionFailed(f"there is {row.name!r} already; leave the condition out to change it, or choose another name")
    if condition.match not in (None, "*", row.etag):
        found = f"{row.name!r} has changed: its etag is {row.etag!r}, not {str(condition.match)[:80]!r}"
        raise PreconditionFailed(f"{found}; look at it again before you change it")


def change(connection: Connection, row: Row[Any], **values: int) -> str:
    """Give a locked row a new etag, and other values. Returns the etag."""
    etag = new_etag()
    here = (names.c.tenant == row.tenant) & (names.c.name == row.name)
    connection.execute(update(names).where(here).values(etag=etag, **values))
    return etag


def new_etag() -> str:
    """Random, so that a name that was removed and made again has none of its old ones."""
    return secrets.token_hex(8)
