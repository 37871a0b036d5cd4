"""The tenant's aliases, as the clients offer them: ``Aliases`` and, with ``await``, ``AsyncAliases``."""

from __future__ import annotations

from medley_client import alias_flows
from medley_client.flow import AsyncRun, Run
from medley_client.types import AdapterChoice, Alias


class Aliases:
    """Names that mean one adapter version, or several with weights: a canary. ``if_match`` takes an ``Alias.etag``."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def list(self) -> list[Alias]:
        """All aliases, by name."""
        return self._run(alias_flows.list_aliases())

    def show(self, name: str) -> Alias:
        """What an alias means now."""
        return self._run(alias_flows.show(name))

    def set(self, name: str, targets: AdapterChoice, *, if_match: str | None = None, create: bool = False) -> Alias:
        """Make the name mean one reference, or several by weight: ``{"bot@v3": 90, "bot@v4": 10}``. The change is made as a whole.

        ``create`` refuses a name that exists.
        """
        return self._run(alias_flows.put(name, targets, if_match, create))

    def delete(self, name: str, *, if_match: str | None = None) -> None:
        """Forget an alias; what it meant stays."""
        self._run(alias_flows.delete(name, if_match))


class AsyncAliases:
    """``Aliases`` with ``await``."""

    def __init__(self, run: AsyncRun) -> None:
        self._run = run

    async def list(self) -> list[Alias]:
        return await self._run(alias_flows.list_aliases())

    async def show(self, name: str) -> Alias:
        return await self._run(alias_flows.show(name))

    async def set(self, name: str, targets: AdapterChoice, *, if_match: str | None = None, create: bool = False) -> Alias:
        return await self._run(alias_flows.put(name, targets, if_match, create))

    async def delete(self, name: str, *, if_match: str | None = None) -> None:
        await self._run(alias_flows.delete(name, if_match))
