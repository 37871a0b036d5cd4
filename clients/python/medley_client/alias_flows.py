"""What can be asked about aliases, and how the answers are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medley_client.adapter_flows import address, conditions, pages
from medley_client.flow import Call, Flow, request, send
from medley_client.types import AdapterChoice, Alias, Target

ALIASES = "/v1/aliases"


def list_aliases() -> Flow[list[Alias]]:
    return (yield from pages(ALIASES, read_alias))


def show(name: str) -> Flow[Alias]:
    return read_alias((yield from request(Call("GET", address(ALIASES, name)))))


def put(name: str, targets: AdapterChoice, if_match: str | None, create: bool) -> Flow[Alias]:
    weights = {targets: 1.0} if isinstance(targets, str) else targets
    body = {"targets": [{"adapter": reference, "weight": weight} for reference, weight in weights.items()]}
    call = Call("PUT", address(ALIASES, name), body, headers=conditions(if_match, create))
    return read_alias((yield from request(call)))


def delete(name: str, if_match: str | None) -> Flow[None]:
    yield from send(Call("DELETE", address(ALIASES, name), headers=conditions(if_match)))


def read_alias(body: Mapping[str, Any]) -> Alias:
    targets = tuple(Target(item["adapter"], item["weight"]) for item in body["targets"])
    return Alias(body["name"], targets, body.get("etag", ""))
