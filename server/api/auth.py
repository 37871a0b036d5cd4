"""API keys: who is calling. Keys live in a file as sha256 only; without a file everybody is the tenant ``default``, and an operator.

File format, a line each: ``tenant:key id:sha256 of the secret``, with ``:operator`` behind it for those who may look at the server as a
whole. ``python -m server.api.auth new TENANT --file keys.txt`` makes one, with ``--operator`` such a one.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import os
import re
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from server.errors import ApiError

DEFAULT_TENANT = "default"
OPERATOR = "operator"
_TENANT = re.compile("[a-z0-9][a-z0-9._-]{0,63}")
_KEY = re.compile("medley_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_LINE = re.compile(f"(?P<tenant>{_TENANT.pattern}):(?P<id>[^:]+):(?P<sha256>[0-9a-f]{{64}})(?P<scope>:{OPERATOR})?")
_RECHECK_S = 1.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a key stands for. An operator sees the server as a whole, other tenants' names included."""

    tenant: str
    is_operator: bool = False


@dataclass(frozen=True, slots=True)
class _Key:
    caller: Caller
    sha256: str


_NOBODY = _Key(Caller(""), "")


class Keys:
    """The keys of a file, read again within a second of a change, so that a revoked key stops working."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._keys: dict[str, _Key] = {}
        self._stamp: tuple[int, int] | None = None
        self._checked = 0.0
        self._refresh()

    def caller(self, authorization: str | None) -> Caller:
        """The caller by an Authorization header. Raises ApiError."""
        if self._path is None:
            return Caller(DEFAULT_TENANT, is_operator=True)
        self._refresh()
        if not authorization:
            raise ApiError("missing_api_key", "this server needs an API key: send the header `Authorization: Bearer KEY`")
        scheme, _, key = authorization.partition(" ")
        match = _KEY.fullmatch(key.strip())
        found = self._keys.get(match[1], _NOBODY) if match else _NOBODY
        # Compared in constant time, also for unknown ids; ids are not secret.
        same = hmac.compare_digest(_hash(match[2] if match else ""), found.sha256)
        if scheme.lower() != "bearer" or found is _NOBODY or not same:
            raise ApiError("invalid_api_key", "the API key is not valid; check that all of it was copied, or ask for a new one")
        return found.caller

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._path is None or now - self._checked < _RECHECK_S:
            return
        self._checked = now
        status = self._path.stat()
        stamp = (status.st_mtime_ns, status.st_size)
        if stamp != self._stamp:
            self._stamp, self._keys = stamp, _read(self._path)


def _read(path: Path) -> dict[str, _Key]:
    keys = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"{path}, line {number}: expected tenant:key id:sha256, or tenant:key id:sha256:{OPERATOR}")
        keys[match["id"]] = _Key(Caller(match["tenant"], match["scope"] is not None), match["sha256"])
    return keys


def new_key(tenant: str, *, is_operator: bool = False) -> tuple[str, str]:
    """A fresh key and the line to store for it. The key itself is kept nowhere."""
    if not _TENANT.fullmatch(tenant):
        raise ValueError(f"tenant {tenant!r} does not match {_TENANT.pattern}")
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    scope = f":{OPERATOR}" if is_operator else ""
    return f"medley_{key_id}_{secret}", f"{tenant}:{key_id}:{_hash(secret)}{scope}"


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def main() -> None:
    """Make a key: it is printed once, and its hash is appended to the file."""
    parser = argparse.ArgumentParser(prog="python -m server.api.auth", description="Make API keys for a keys file.")
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="make a key for a tenant and print it once")
    new.add_argument("tenant")
    new.add_argument("--file", type=Path, required=True, help="keys file to append to; made if it does not exist")
    new.add_argument("--operator", action="store_true", help="the key may also look at the server as a whole (GET /v1/registry)")
    arguments = parser.parse_args()
    try:
        key, line = new_key(arguments.tenant, is_operator=arguments.operator)
    except ValueError as error:
        parser.error(str(error))
    handle = os.open(arguments.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(handle, "a") as file:
        file.write(line + "\n")
    sys.stdout.write(key + "\n")


if __name__ == "__main__":
    main()
