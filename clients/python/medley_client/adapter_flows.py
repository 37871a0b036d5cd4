"""What can be asked about adapters that are on the server, and how the answers are read. Pushing and pulling have modules of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

from medley_client.errors import MedleyError
from medley_client.flow import Call, Flow, request, send
from medley_client.types import Adapter, PushedAdapter, Quarantine, StoredFile

ADAPTERS = "/v1/adapters"
LATEST = "latest"
_PAGE = 1000
T = TypeVar("T")


def address(*parts: str) -> str:
    """A path from names and references."""
    return "/".join(quote(part, safe="/@:") for part in parts)


def conditions(if_match: str | None, create: bool = False) -> dict[str, str]:
    """The headers that make a write happen only in the state that the caller knows: an etag, or "there is none yet"."""
    if if_match is not None and create:
        raise MedleyError("if_match is for a name that exists, create for one that does not; give one of them")
    if create:
        return {"if-none-match": "*"}
    return {} if if_match is None else {"if-match": '"' + if_match.strip('"') + '"'}


def pages(path: str, read: Callable[[Mapping[str, Any]], T]) -> Flow[list[T]]:
    """All items of a list that comes in pages."""
    found: list[T] = []
    after: str | None = ""
    while after is not None:
        page = yield from request(Call("GET", path, params={"limit": _PAGE, "after": after}))
        found += [read(item) for item in page["data"]]
        after = page["next"]
    return found


def list_adapters() -> Flow[list[Adapter]]:
    return (yield from pages(ADAPTERS, read_adapter))


def show(name: str) -> Flow[Adapter]:
    return read_adapter((yield from request(Call("GET", address(ADAPTERS, name)))))


def delete(reference: str, if_match: str | None) -> Flow[int]:
    gone = yield from request(Call("DELETE", address(ADAPTERS, reference), headers=conditions(if_match)))
    return len(gone["deleted"])


def tags(name: str) -> Flow[dict[str, str]]:
    return dict((yield from request(Call("GET", address(ADAPTERS, name, "tags"))))["tags"])


def tag(name: str, tag: str, version: str, if_match: str | None, create: bool = False) -> Flow[dict[str, str]]:
    call = Call("PUT", address(ADAPTERS, name, "tags", tag), {"version": version}, headers=conditions(if_match, create))
    return dict((yield from request(call))["tags"])


def untag(name: str, tag: str, if_match: str | None) -> Flow[None]:
    yield from send(Call("DELETE", address(ADAPTERS, name, "tags", tag), headers=conditions(if_match)))


def rollback(name: str, to: str | None) -> Flow[str]:
    """The version that the name means then. Nobody can move it in between: the change is bound to what was read."""
    adapter = yield from show(name)
    moved = yield from tag(name, LATEST, to or _before(adapter), adapter.etag or None)
    return moved[LATEST]


def load(reference: str) -> Flow[Adapter]:
    return read_adapter((yield from request(Call("POST", address(ADAPTERS, reference, "load")))))


def pin(reference: str) -> Flow[Adapter]:
    return read_adapter((yield from request(Call("POST", address(ADAPTERS, reference, "pin")))))


def unpin(reference: str) -> Flow[Adapter]:
    return read_adapter((yield from request(Call("DELETE", address(ADAPTERS, reference, "pin")))))


def read_adapter(body: Mapping[str, Any]) -> Adapter:
    return Adapter(**_fields(body))


def read_pushed(body: Mapping[str, Any]) -> PushedAdapter:
    return PushedAdapter(**_fields(body), skipped=tuple(body.get("skipped", ())))


def read_file(body: Mapping[str, Any]) -> StoredFile:
    return StoredFile(body["name"], body["digest"], body["bytes"])


def _before(adapter: Adapter) -> str:
    """The newest version that is older than what the name means now."""
    current = int(adapter.version.removeprefix("v"))
    older = [number for item in adapter.versions if (number := int(item.version.removeprefix("v"))) < current]
    if not older:
        raise MedleyError(f"{adapter.name} is {adapter.version}, and there is no version before it")
    return f"v{max(older)}"


def _fields(body: Mapping[str, Any]) -> dict[str, Any]:
    named = body.get("tags", {})
    closed = body.get("quarantine")
    return {
        "name": body["name"],
        "version": body["version"],
        "digest": body["digest"],
        "created": body["created"],
        "nbytes": body["bytes"],
        "facts": dict(body.get("facts", {})),
        "files": tuple(read_file(item) for item in body.get("files", ())),
        # Of one version among several the server lists names only: they all mean this version.
        "tags": dict(named) if isinstance(named, Mapping) else dict.fromkeys(named, body["version"]),
        "etag": body.get("etag", ""),
        "last_used": body.get("last_used"),
        "versions": tuple(read_adapter(item) for item in body.get("versions", ())),
        "residency": dict(body.get("residency", {})),
        "load_seconds": dict(body.get("load_seconds", {})),
        "pinned": body.get("pinned", False),
        "quarantine": closed and Quarantine(closed["code"], closed["failures"], closed["at"]),
    }
