"""Client of Medley, the multi-tenant adapter inference server."""

from medley_client.client import AsyncMedley, Medley
from medley_client.errors import ApiError, CannotConnect, Fault, MedleyError
from medley_client.types import Adapter, Classified, ClassifiedToken, Generated, PushedAdapter, Token

__all__ = [
    "Adapter",
    "ApiError",
    "AsyncMedley",
    "CannotConnect",
    "Classified",
    "ClassifiedToken",
    "Fault",
    "Generated",
    "Medley",
    "MedleyError",
    "PushedAdapter",
    "Token",
]
__version__ = "0.1.0"
