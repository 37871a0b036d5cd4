"""What is wrong with an adapter, in words that a tenant can act on. Knows nothing of HTTP."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One reason to refuse an adapter.

    ``where`` names the place (``adapter_config.json: r``, a tensor key, a file), ``message`` says what is wrong
    and how to fix it. ``expected`` and ``found`` are short and optional.
    """

    code: str
    where: str
    message: str
    expected: str | None = None
    found: str | None = None


class LoweringError(Exception):
    """An adapter cannot be lowered onto this base. Carries every fault found, not only the first."""

    def __init__(self, faults: list[Fault]) -> None:
        if not faults:
            raise ValueError("a LoweringError needs at least one fault")
        super().__init__("; ".join(f"{fault.where}: {fault.message}" for fault in faults))
        self.faults = tuple(faults)
