"""Aliases: names that mean other names' versions, each for a share of the users. An alias never means another alias."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence

from sqlalchemy import Connection, delete, insert, select

from adapter_store import lookup, names, schema
from adapter_store.database import Database
from adapter_store.errors import AdapterNotFound, InvalidAlias
from adapter_store.manifest import Reference, parse_reference
from adapter_store.types import ALWAYS, AdapterVersion, Alias, Condition, Target

MAX_TARGETS = 16
_targets = schema.alias_targets


class Aliases:
    """The aliases of all tenants. Thread-safe."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def set(self, tenant: str, name: str, targets: Sequence[Target], condition: Condition = ALWAYS) -> Alias:
        """Make or change an alias. Raises InvalidAlias, AdapterNotFound, NameTaken, PreconditionFailed."""
        references = _checked(targets)
        with self._database.write() as connection:
            row = names.take(self._database, connection, tenant, name, schema.ALIAS, condition)
            kinds = names.keep(connection, tenant, [reference.name for reference in references])
            for target, reference in zip(targets, references, strict=True):
                if kinds.get(reference.name) == schema.ALIAS:
                    raise InvalidAlias(f"{reference.name!r} is an alias itself; name the adapters that it means")
                if lookup.find_row(connection, tenant, reference) is None:
                    raise lookup.not_found(target.reference)
            here = (_targets.c.tenant == tenant) & (_targets.c.alias == name)
            connection.execute(delete(_targets).where(here))
            connection.execute(
                insert(_targets),
                [
                    {
                        "tenant": tenant,
                        "alias": name,
                        "place": place,
                        "reference": target.reference,
                        "target": reference.name,
                        "weight": target.weight,
                    }
                    for place, (target, reference) in enumerate(zip(targets, references, strict=True))
                ],
            )
            return Alias(tenant, name, tuple(targets), names.change(connection, row))

    def get(self, tenant: str, name: str) -> Alias:
        """One alias. Raises AdapterNotFound."""
        with self._database.read() as connection:
            found = _aliases(connection, tenant, name, 1, "")
        if not found:
            raise _not_found(name)
        return found[0]

    def page(self, tenant: str, limit: int, after: str) -> tuple[Alias, ...]:
        """Up to ``limit`` aliases in the order of their names' bytes, those after ``after``."""
        with self._database.read() as connection:
            return _aliases(connection, tenant, None, limit, after)

    def remove(self, tenant: str, name: str, condition: Condition = ALWAYS) -> None:
        """Remove an alias; what it means stays. Raises AdapterNotFound, PreconditionFailed."""
        with self._database.write() as connection:
            row = names.lock(connection, tenant, name, schema.ALIAS)
            if row is None:
                raise _not_found(name)
            names.check(condition, row)
            here = (schema.names.c.tenant == tenant) & (schema.names.c.name == name)
            connection.execute(delete(schema.names).where(here))


def choose(alias: str, targets: Sequence[Target], user: str | None) -> Target:
    """The target that a user gets: always the same as long as the alias is; without ``user``, any, by their weights.

    A user's place on the line of all weights depends on the alias and the user alone. So a changed weight moves only those
    users whose place comes to lie in another target's part.
    """
    if user is None:
        place = random.random()  # noqa: S311 - a fair share, not a secret
    else:
        digest = hashlib.sha256(f"{alias}\0{user}".encode(errors="surrogatepass")).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
    place *= sum(target.weight for target in targets)
    for target in targets:
        place -= target.weight
        if place < 0:
            return target
    return targets[-1]  # rounding may leave a little


def find(connection: Connection, tenant: str, name: str, user: str | None) -> AdapterVersion | None:
    """The version that an alias means for a user, or None when there is no such alias."""
    query = select(_targets.c.reference, _targets.c.weight).where(_targets.c.tenant == tenant, _targets.c.alias == name)
    targets = [Target(*row) for row in connection.execute(query.order_by(_targets.c.place))]
    if not targets:
        return None
    return lookup.find_version(connection, tenant, parse_reference(choose(name, targets, user).reference))


def naming(connection: Connection, tenant: str, name: str) -> list[tuple[str, Reference]]:
    """The aliases that mean a version of this adapter, each with how it names it."""
    query = select(_targets.c.alias, _targets.c.reference).where(_targets.c.tenant == tenant, _targets.c.target == name)
    return [(row.alias, parse_reference(row.reference)) for row in connection.execute(query.order_by(_targets.c.alias))]


def _checked(targets: Sequence[Target]) -> list[Reference]:
    references = [parse_reference(target.reference) for target in targets]
    if not 0 < len(targets) <= MAX_TARGETS:
        raise InvalidAlias(f"an alias means 1 to {MAX_TARGETS} adapters, not {len(targets)}")
    for target in targets:
        if not (math.isfinite(target.weight) and target.weight > 0):
            raise InvalidAlias(
                f"the weight of {target.reference!r} is {target.weight}; leave the target out, or give it a share above 0"
            )
    if len(set(references)) < len(references):
        raise InvalidAlias("the alias names one adapter twice; add its weights up")
    return references


def _aliases(connection: Connection, tenant: str, name: str | None, limit: int, after: str) -> tuple[Alias, ...]:
    query = select(schema.names).where(schema.names.c.tenant == tenant, schema.names.c.kind == schema.ALIAS)
    query = query.where(schema.names.c.name == name if name is not None else schema.names.c.name > after)
    rows = connection.execute(query.order_by(schema.names.c.name).limit(limit)).all()
    targets: dict[str, list[Target]] = {}
    for row in connection.execute(
        select(_targets)
        .where(_targets.c.tenant == tenant, _targets.c.alias.in_([row.name for row in rows]))
        .order_by(_targets.c.place)
    ):
        targets.setdefault(row.alias, []).append(Target(row.reference, row.weight))
    return tuple(Alias(tenant, row.name, tuple(targets[row.name]), row.etag) for row in rows)


def _not_found(name: str) -> AdapterNotFound:
    return AdapterNotFound(f"there is no alias {name!r}; list yours with GET /v1/aliases")
