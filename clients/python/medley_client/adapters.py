"""The tenant's adapters, as the clients offer them: ``Adapters`` and, with ``await``, ``AsyncAdapters``."""

from __future__ import annotations

from pathlib import Path

from medley_client import adapter_flows
from medley_client.files import Progress
from medley_client.flow import AsyncRun, Run
from medley_client.pull import pull
from medley_client.push import Push, push
from medley_client.remembered import RememberedUploads
from medley_client.types import Adapter, PulledAdapter, PushedAdapter


class Adapters:
    """The tenant's adapters on the server.

    ``if_match`` takes an ``Adapter.etag``: the change is made only if nothing else changed the name since; otherwise ApiError
    ``precondition_failed``.
    """

    def __init__(self, run: Run, server: str) -> None:
        self._run = run
        self._server = server

    def push(
        self,
        source: str | Path,
        name: str,
        *,
        rank: int | None = None,
        exact: bool = False,
        tag: str | None = None,
        if_match: str | None = None,
        create: bool = False,
        idempotency_key: str | None = None,
        resume: bool = True,
        progress: Progress | None = None,
    ) -> PushedAdapter:
        """Upload an adapter directory, or a zip or tar of one; or a fine-tuned model with ``rank`` or ``exact`` (see ``find_files``).

        Files that the server has already are not sent. The push makes a new version the ``latest``, or only what ``tag`` names.
        ``create`` refuses a name that exists. A push that was cut off goes on where it stopped when it is repeated within a day; without
        ``resume`` it starts again, and nothing is kept on this machine. ``progress`` may be called from another thread.
        """
        uploads = RememberedUploads(self._server) if resume else None
        wanted = Push(Path(source), name, rank, exact, tag, if_match, create, idempotency_key, uploads, progress)
        return self._run(push(wanted))

    def pull(
        self, reference: str, directory: str | Path, *, overwrite: bool = False, progress: Progress | None = None
    ) -> PulledAdapter:
        """Download what was uploaded, checked against its digests. Files that are there already are kept; other content in their place
        is refused, or replaced with ``overwrite``."""
        return self._run(pull(reference, Path(directory), overwrite, progress))

    def list(self) -> list[Adapter]:
        """All adapters, by name."""
        return self._run(adapter_flows.list_adapters())

    def show(self, name: str) -> Adapter:
        """One adapter with all of its versions, where it is loaded and when it was used."""
        return self._run(adapter_flows.show(name))

    def delete(self, reference: str, *, if_match: str | None = None) -> int:
        """Remove a name, or one version of it (``name@v2``). Returns how many versions went."""
        return self._run(adapter_flows.delete(reference, if_match))

    def tags(self, name: str) -> dict[str, str]:
        """Tag → version."""
        return self._run(adapter_flows.tags(name))

    def tag(self, name: str, tag: str, version: str, *, if_match: str | None = None) -> dict[str, str]:
        """Make ``name@tag`` mean a version (``v2``, ``sha256:…`` or another tag). Returns all tags."""
        return self._run(adapter_flows.tag(name, tag, version, if_match))

    def untag(self, name: str, tag: str, *, if_match: str | None = None) -> None:
        """Forget a tag; the version that it names stays."""
        self._run(adapter_flows.untag(name, tag, if_match))

    def rollback(self, name: str, to: str | None = None) -> str:
        """Make the bare name mean version ``to``, or the version before the one that it means now. Returns the version."""
        return self._run(adapter_flows.rollback(name, to))

    def load(self, reference: str) -> Adapter:
        """Begin to bring it to memory, before the first request, without waiting until it is there. Ends a quarantine."""
        return self._run(adapter_flows.load(reference))

    def pin(self, reference: str) -> Adapter:
        """Keep the version that this means now on the device, whatever else is asked for."""
        return self._run(adapter_flows.pin(reference))

    def unpin(self, reference: str) -> Adapter:
        """Let it go like any other."""
        return self._run(adapter_flows.unpin(reference))


class AsyncAdapters:
    """``Adapters`` with ``await``."""

    def __init__(self, run: AsyncRun, server: str) -> None:
        self._run = run
        self._server = server

    async def push(
        self,
        source: str | Path,
        name: str,
        *,
        rank: int | None = None,
        exact: bool = False,
        tag: str | None = None,
        if_match: str | None = None,
        create: bool = False,
        idempotency_key: str | None = None,
        resume: bool = True,
        progress: Progress | None = None,
    ) -> PushedAdapter:
        uploads = RememberedUploads(self._server) if resume else None
        wanted = Push(Path(source), name, rank, exact, tag, if_match, create, idempotency_key, uploads, progress)
        return await self._run(push(wanted))

    async def pull(
        self, reference: str, directory: str | Path, *, overwrite: bool = False, progress: Progress | None = None
    ) -> PulledAdapter:
        return await self._run(pull(reference, Path(directory), overwrite, progress))

    async def list(self) -> list[Adapter]:
        return await self._run(adapter_flows.list_adapters())

    async def show(self, name: str) -> Adapter:
        return await self._run(adapter_flows.show(name))

    async def delete(self, reference: str, *, if_match: str | None = None) -> int:
        return await self._run(adapter_flows.delete(reference, if_match))

    async def tags(self, name: str) -> dict[str, str]:
        return await self._run(adapter_flows.tags(name))

    async def tag(self, name: str, tag: str, version: str, *, if_match: str | None = None) -> dict[str, str]:
        return await self._run(adapter_flows.tag(name, tag, version, if_match))

    async def untag(self, name: str, tag: str, *, if_match: str | None = None) -> None:
        await self._run(adapter_flows.untag(name, tag, if_match))

    async def rollback(self, name: str, to: str | None = None) -> str:
        return await self._run(adapter_flows.rollback(name, to))

    async def load(self, reference: str) -> Adapter:
        return await self._run(adapter_flows.load(reference))

    async def pin(self, reference: str) -> Adapter:
        return await self._run(adapter_flows.pin(reference))

    async def unpin(self, reference: str) -> Adapter:
        return await self._run(adapter_flows.unpin(reference))
