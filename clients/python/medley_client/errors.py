"""What can go wrong.

MedleyError
├── CannotConnect        nobody answers at the address
│   └── ConnectionBroke  somebody did, and then the connection broke
└── ApiError             the server refused or failed; code, status, faults, request id
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One reason why an adapter was refused."""

    code: str
    where: str
    message: str
    expected: str | None = None
    found: str | None = None


class MedleyError(Exception):
    """Base of everything that the client raises on purpose."""


class CannotConnect(MedleyError):
    """Nobody answers at the address, or not in time."""


class ConnectionBroke(CannotConnect):
    """The connection broke while a request was under way: it may have been done or not."""


class ApiError(MedleyError):
    """The server refused or failed. ``code`` is one of the server's docs/ERRORS.md."""

    def __init__(
        self, message: str, *, status: int, code: str, faults: Sequence[Fault] = (), request_id: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.faults = tuple(faults)
        self.request_id = request_id
