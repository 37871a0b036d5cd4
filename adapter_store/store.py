"""The store: one façade over blobs and catalog. Synchronous and thread-safe; callers on an event loop use threads.

<directory>/
  catalog.sqlite   names, versions, tags, aliases and the rest of schema, unless a URL says where they are
  blobs/           content-addressed files (see blobs)
  uploads/         uploads under way
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL

from adapter_store import migrations
from adapter_store.aliases import Aliases
from adapter_store.blob_records import UNTOUCHED_S, BlobRecords
from adapter_store.blobs import BlobStore, LocalBlobs
from adapter_store.catalog import Catalog, Once
from adapter_store.database import Database
from adapter_store.errors import AdapterNotFound, AdapterRejected, Fault, InvalidName
from adapter_store.idempotency import Idempotency, publish_fingerprint
from adapter_store.manifest import Reference, check_name, check_tag, parse_reference
from adapter_store.pins import Pins
from adapter_store.staging import StagedAdapter, StagedFile, Staging
from adapter_store.types import (
    ALWAYS,
    LATEST,
    AdapterRecord,
    AdapterVersion,
    Alias,
    Condition,
    Replay,
    Swept,
    Target,
    VersionFile,
)

__all__ = ["AdapterRecord", "AdapterVersion", "Alias", "Condition", "Replay", "Store", "Swept", "Target", "VersionFile"]


class Store:
    """Adapters of all tenants. What one tenant asks never shows another's."""

    def __init__(self, database: Database, blobs: BlobStore, uploads: Path, max_upload_bytes: int) -> None:
        self._database = database
        self._blob_records = BlobRecords(database)
        self._idempotency = Idempotency(database)
        self._catalog = Catalog(database, self._blob_records, self._idempotency)
        self._aliases = Aliases(database)
        self._pins = Pins(database)
        self._blobs = blobs
        self._uploads = uploads
        self._max_upload_bytes = max_upload_bytes

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        max_upload_bytes: int = 1 << 30,
        catalog_url: str | None = None,
        clock: Callable[[], float] = time.time,
    ) -> Store:
        """Open or create a store in a local directory, or with its catalog in a database of its own. Raises StoreUnavailable."""
        directory.mkdir(parents=True, exist_ok=True)
        local = URL.create("sqlite", database=str(directory / "catalog.sqlite"))
        uploads = directory / "uploads"
        uploads.mkdir(exist_ok=True)
        database = Database(catalog_url or local, clock)
        migrations.upgrade(database)
        store = cls(database, LocalBlobs(directory / "blobs"), uploads, max_upload_bytes)
        store._take_over()
        store.sweep()
        return store

    def close(self) -> None:
        """Close the catalog's connections."""
        self._database.close()

    # Publishing

    def begin_upload(self) -> Staging:
        """A place for one upload's files; use it as a context manager."""
        return Staging(self._uploads, self._max_upload_bytes)

    def with_children(self, tenant: str, staged: StagedAdapter) -> StagedAdapter:
        """A fusion together with the files of the tenant's adapters that it names, as they are now: what becomes of those later does not
        touch it. Other uploads as they are. Raises AdapterRejected with every name that means no adapter."""
        files: list[StagedFile] = []
        faults: list[Fault] = []
        for name in staged.children:
            try:
                version = self._catalog.resolve(tenant, Reference(check_name(name), tag=LATEST))
            except (AdapterNotFound, InvalidName):
                message = f"store the adapter that the fusion calls {name[:64]!r} under this name first"
                faults.append(Fault("missing_child", "adapter_fusion_config.json: name", message, found=name[:64]))
                continue
            for file in version.files:
                if file.role in ("config", "weights"):
                    path = self._blobs.path(file.sha256)
                    files.append(StagedFile(f"child/{name}/{file.role}", f"{name}/{file.name}", path, file.sha256, file.nbytes))
        if faults:
            raise AdapterRejected(faults)
        return staged.with_files(files) if files else staged

    def fingerprint(self, name: str, staged: StagedAdapter, tag: str = LATEST) -> str:
        """What ``commit`` compares under an idempotency key."""
        return publish_fingerprint(name, tag, {file.role: file.sha256 for file in staged.files})

    def replay(self, tenant: str, key: str) -> Replay | None:
        """The reply stored under an idempotency key in the last 24 hours, or None."""
        return self._idempotency.replay(tenant, key)

    def commit(
        self,
        tenant: str,
        name: str,
        staged: StagedAdapter,
        facts: dict[str, Any],
        *,
        tag: str = LATEST,
        condition: Condition = ALWAYS,
        idempotency_key: str | None = None,
        reply: Callable[[AdapterVersion], tuple[int, str]] | None = None,
    ) -> AdapterVersion:
        """Publish a checked upload under a name and move ``tag`` to it. Blobs first, then one transaction that makes them visible.

        With an idempotency key, ``reply`` gives status and body of the reply, which is stored in the same transaction. When one is
        stored already, nothing is changed and the version that was made then comes back: answer with ``replay`` in any case.
        Raises InvalidName, NameTaken, PreconditionFailed, IdempotencyKeyReused, StorageFull, StoreUnavailable.
        """
        check_name(name)
        check_tag(tag)
        assert (idempotency_key is None) == (reply is None), "a key and its reply come together"
        once = Once(idempotency_key, self.fingerprint(name, staged, tag), reply) if idempotency_key and reply else None
        for file in staged.files:
            self._keep(file)
        files = tuple(VersionFile(file.role, file.name, file.sha256, file.nbytes) for file in staged.files)
        return self._catalog.publish(tenant, name, staged.digest, files, facts, tag, condition, once)

    # Looking

    def resolve(self, tenant: str, reference: str, user: str | None = None) -> AdapterVersion:
        """The version that ``name``, ``name@v3``, ``name@sha256:…`` or ``name@tag`` means. ``name`` may be an alias too: then ``user``
        always gets the same of its targets. Raises AdapterNotFound, InvalidName."""
        return self._catalog.resolve(tenant, parse_reference(reference), user)

    def get(self, tenant: str, name: str) -> AdapterRecord:
        """An adapter with its versions and tags. Raises AdapterNotFound, InvalidName."""
        return self._catalog.get(tenant, check_name(name))

    def records(self, tenant: str, limit: int = 100, after: str = "") -> tuple[AdapterRecord, ...]:
        """Up to ``limit`` adapters by name, those after ``after``. Raises InvalidName when ``after`` can be no name."""
        return self._catalog.page(tenant, limit, after and check_name(after))

    def has_digest(self, digest: str) -> bool:
        """Whether any tenant has an adapter of these files. For the server's own care of what it made of them, never for an answer."""
        return bool(self._catalog.tenants_of(digest))

    def tenants_of(self, digest: str) -> set[str]:
        """The tenants that have an adapter of these files. For the server's own care, never for an answer."""
        return self._catalog.tenants_of(digest)

    def digests(self) -> set[str]:
        """The digests of everything stored, whoever has it."""
        return self._catalog.digests()

    def files(self, version: AdapterVersion) -> dict[str, Path]:
        """Local files of a version by role."""
        return {role: self._blobs.path(sha256) for role, sha256 in version.blobs.items()}

    @contextmanager
    def checkout(self, version: AdapterVersion) -> Iterator[dict[str, Path]]:
        """Local files of a version by role, while the context is open."""
        yield self.files(version)

    # Changing what names mean

    def set_tag(self, tenant: str, name: str, tag: str, version_reference: str, condition: Condition = ALWAYS) -> AdapterRecord:
        """Make a tag name a version, given as ``v3``, ``sha256:…`` or another tag. Raises AdapterNotFound, InvalidName,
        PreconditionFailed; ``absent`` of the condition is about the tag."""
        version = parse_reference(f"{name}@{version_reference}")
        return self._catalog.set_tag(tenant, name, check_tag(tag), version, condition)

    def remove_tag(self, tenant: str, name: str, tag: str, condition: Condition = ALWAYS) -> AdapterRecord:
        """Remove a tag other than ``latest``. Raises AdapterNotFound, InvalidName, PreconditionFailed, VersionInUse."""
        return self._catalog.remove_tag(tenant, check_name(name), check_tag(tag), condition)

    def delete(self, tenant: str, reference: str, condition: Condition = ALWAYS) -> list[AdapterVersion]:
        """Remove an adapter or one version of it. Blobs that nobody uses any more go at a later sweep.
        Raises AdapterNotFound, InvalidName, PreconditionFailed, VersionInUse."""
        return self._catalog.remove(tenant, parse_reference(reference), condition)

    def set_alias(self, tenant: str, name: str, targets: Sequence[Target], condition: Condition = ALWAYS) -> Alias:
        """Make or change an alias. Raises AdapterNotFound, InvalidAlias, InvalidName, NameTaken, PreconditionFailed."""
        return self._aliases.set(tenant, check_name(name), targets, condition)

    def alias(self, tenant: str, name: str) -> Alias:
        """One alias. Raises AdapterNotFound, InvalidName."""
        return self._aliases.get(tenant, check_name(name))

    def aliases(self, tenant: str, limit: int = 100, after: str = "") -> tuple[Alias, ...]:
        """Up to ``limit`` aliases by name, those after ``after``. Raises InvalidName when ``after`` can be no name."""
        return self._aliases.page(tenant, limit, after and check_name(after))

    def remove_alias(self, tenant: str, name: str, condition: Condition = ALWAYS) -> None:
        """Remove an alias. Raises AdapterNotFound, InvalidName, PreconditionFailed."""
        self._aliases.remove(tenant, check_name(name), condition)

    # Use

    def pin(self, tenant: str, digest: str) -> None:
        """Want an adapter to stay on the device. Raises AdapterNotFound, PinLimit."""
        self._pins.add(tenant, digest)

    def unpin(self, tenant: str, digest: str) -> None:
        """Take a pin back; no error when there is none."""
        self._pins.remove(tenant, digest)

    def pins(self) -> set[tuple[str, str]]:
        """(tenant, digest) of every pin."""
        return self._pins.all()

    def touch(self, used: Mapping[tuple[str, str, int], float]) -> None:
        """Write down when versions (tenant, name, number) were last used, in seconds since the epoch."""
        self._catalog.touch(used)

    # Care

    def sweep(self) -> Swept:
        """Remove what nobody needs and nobody has touched for an hour. Safe beside uploads, and on several replicas at once."""
        self._idempotency.expire()
        self._blob_records.expire()
        blobs = sum(self._blob_records.remove(sha256, self._blobs.delete) for sha256 in self._blob_records.orphans())
        return Swept(blobs, self._sweep_uploads())

    def _sweep_uploads(self) -> int:
        stale = [path for path in self._uploads.iterdir() if _last_change(path) <= self._database.now() - UNTOUCHED_S]
        for path in stale:
            shutil.rmtree(path, ignore_errors=True)
        return len(stale)

    def _take_over(self) -> None:
        self._blob_records.take_over(self._blobs.digests, lambda sha256: self._blobs.path(sha256).stat().st_size)

    def _keep(self, file: StagedFile) -> None:
        """Store a file's bytes; its row first (see blob_records)."""
        self._blob_records.note(file.sha256, file.nbytes)
        self._blobs.put(file.path, file.sha256)


def _last_change(directory: Path) -> float:
    """When anything in an upload's directory was written last; now, if the upload ends while we look."""
    try:
        return max(path.stat().st_mtime for path in (directory, *directory.iterdir()))
    except FileNotFoundError:
        return time.time()
