"""Client of Medley, the multi-tenant adapter inference server."""

from medley_client.client import AsyncMedley, Medley
from medley_client.errors import ApiError, CannotConnect, ConnectionBroke, Fault, MedleyError
from medley_client.types import (
    Adapter,
    Alias,
    Classified,
    ClassifiedToken,
    Generated,
    PulledAdapter,
    PushedAdapter,
    Quarantine,
    StoredFile,
    Target,
    Token,
)

__all__ = [
    "Adapter",
    "Alias",
    "ApiError",
    "AsyncMedley",
    "CannotConnect",
    "Classified",
    "ClassifiedToken",
    "ConnectionBroke",
    "Fault",
    "Generated",
    "Medley",
    "MedleyError",
    "PulledAdapter",
    "PushedAdapter",
    "Quarantine",
    "StoredFile",
    "Target",
    "Token",
]
__version__ = "0.1.0"
