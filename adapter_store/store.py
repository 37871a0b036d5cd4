"""The store: one façade over blobs and catalog. Synchronous and thread-safe; callers on an event loop use threads.

<directory>/
  catalog.sqlite   names, versions, tags, aliases and the rest of schema, unless a URL says where they are
  blobs/           content-addressed files (see blobs), or
  cache/           copies of those that an object store has (see blob_cache)
  uploads/         adapters while they arrive (see staging)
  partial/         resumable uploads of single blobs (see uploads)
  checkouts/       links to blobs that somebody reads just now (see checkouts)

All of it is on one filesystem, one that knows hard links.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from sqlalchemy import URL

from adapter_store import migrations
from adapter_store.aliases import Aliases
from adapter_store.blob_cache import BlobCache
from adapter_store.blob_records import OWNED_S, UNTOUCHED_S, BlobRecords
from adapter_store.blobs import BlobStore, LocalBlobs
from adapter_store.catalog import Catalog, Once, Publication
from adapter_store.checkouts import Checkouts
from adapter_store.children import with_children
from adapter_store.database import Database
from adapter_store.durable import clear_directories, read_chunks
from adapter_store.errors import BlobCorrupt, BlobNotFound
from adapter_store.idempotency import Idempotency, publish_fingerprint
from adapter_store.manifest import Reference, check_name, check_tag, parse_reference
from adapter_store.object_blobs import ObjectBlobs
from adapter_store.pins import Pins
from adapter_store.staging import StagedAdapter, Staging, Writer
from adapter_store.types import (
    ALWAYS,
    LATEST,
    AdapterRecord,
    AdapterVersion,
    Alias,
    Condition,
    DeletedVersion,
    Listed,
    Replay,
    Swept,
    Target,
    VersionFile,
)
from adapter_store.uploads import PieceWriter, Uploads


class Store:
    """Adapters of all tenants. What one tenant asks never shows another's."""

    def __init__(self, database: Database, blobs: BlobStore, directory: Path, max_upload_bytes: int) -> None:
        self._database = database
        self._blob_records = BlobRecords(database)
        self._idempotency = Idempotency(database)
        self._catalog = Catalog(database, self._blob_records, self._idempotency)
        self._aliases = Aliases(database)
        self._pins = Pins(database)
        self._blobs = blobs
        self._staging = directory / "uploads"
        self._staging.mkdir(exist_ok=True)
        self._checkouts = Checkouts(directory / "checkouts", blobs)
        self._uploads = Uploads(directory / "partial", max_upload_bytes)
        self._max_upload_bytes = max_upload_bytes

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        max_upload_bytes: int = 1 << 30,
        catalog_url: str | None = None,
        blobs_url: str | None = None,
        blob_cache_bytes: int = 10 << 30,
        clock: Callable[[], float] = time.time,
    ) -> Store:
        """Open or create a store in a local directory, with its catalog or its blobs elsewhere if URLs say so.

        ``blob_cache_bytes`` of remote blobs are kept at hand. Raises StoreUnavailable, and StoreError for an URL that means no store.
        """
        directory.mkdir(parents=True, exist_ok=True)
        database = Database(catalog_url or URL.create("sqlite", database=str(directory / "catalog.sqlite")), clock)
        migrations.upgrade(database)
        if blobs_url is not None:
            cache = BlobCache(directory / "cache", blob_cache_bytes)
            return cls(database, ObjectBlobs.from_url(blobs_url, cache), directory, max_upload_bytes)
        blobs = LocalBlobs(directory / "blobs")
        BlobRecords(database).take_over(blobs.digests, blobs.size)
        return cls(database, blobs, directory, max_upload_bytes)

    def close(self) -> None:
        """Close the catalog's connections."""
        self._database.close()

    # Publishing

    def begin_upload(self) -> Staging:
        """A place for one upload's files; use it as a context manager."""
        return Staging(self._staging, self._max_upload_bytes)

    def with_children(self, tenant: str, staged: StagedAdapter) -> StagedAdapter:
        """A fusion together with the files of the tenant's adapters that it names, as they are now: what becomes of those later does not
        touch it. Other uploads as they are. Raises AdapterRejected with every name that means no adapter, BlobCorrupt."""
        return with_children(staged, lambda name: self._catalog.version(tenant, Reference(name)), self._blobs.link)

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
    ) -> AdapterVersion:
        """Publish a checked upload under a name and move ``tag`` to it. Blobs first, then one transaction that makes them visible.
        Raises InvalidName, NameTaken, PreconditionFailed, StorageFull, StoreUnavailable."""
        return self._catalog.publish(self._stored(tenant, name, staged, facts, tag, condition))

    def commit_once(
        self,
        tenant: str,
        name: str,
        staged: StagedAdapter,
        facts: dict[str, Any],
        *,
        idempotency_key: str,
        reply: Callable[[AdapterVersion], tuple[int, str]],
        tag: str = LATEST,
        condition: Condition = ALWAYS,
    ) -> AdapterVersion | Replay:
        """``commit``, with the status and body that ``reply`` gives stored in the same transaction. When the key has a reply already, that
        comes back and nothing is changed. Raises IdempotencyKeyReused, too."""
        once = Once(idempotency_key, self.fingerprint(name, staged, tag), reply)
        return self._catalog.publish_once(self._stored(tenant, name, staged, facts, tag, condition), once)

    # Looking

    def resolve(self, tenant: str, reference: str, user: str | None = None) -> AdapterVersion:
        """The version that ``name``, ``name@v3``, ``name@sha256:…`` or ``name@tag`` means. ``name`` may be an alias too: then ``user``
        always gets the same of its targets. Raises AdapterNotFound, InvalidName."""
        return self._catalog.resolve(tenant, parse_reference(reference), user)

    def version(self, tenant: str, reference: str) -> AdapterVersion:
        """``resolve`` for adapters only. Raises AdapterNotFound for an alias, too, InvalidName."""
        return self._catalog.version(tenant, parse_reference(reference))

    def get(self, tenant: str, name: str) -> AdapterRecord:
        """An adapter with its versions and tags. Raises AdapterNotFound, InvalidName."""
        return self._catalog.get(tenant, check_name(name))

    def records(self, tenant: str, limit: int = 100, after: str = "") -> tuple[AdapterRecord, ...]:
        """Up to ``limit`` adapters by name, those after ``after``. Raises InvalidName when ``after`` can be no name."""
        return self._catalog.page(tenant, limit, after and check_name(after))

    def listed(self, tenant: str, limit: int = 100, after: str = "") -> tuple[Listed, ...]:
        """Up to ``limit`` adapters and aliases by name, those after ``after``. Raises InvalidName when ``after`` can be no name."""
        return self._catalog.listed(tenant, limit, after and check_name(after))

    def absent(self, digests: Collection[str]) -> set[str]:
        """Those of which no tenant has an adapter. For the server's own care of what it made of them, never for an answer."""
        return set(digests) - self._catalog.present(digests)

    def names_of(self, digests: Collection[str]) -> dict[str, list[AdapterVersion]]:
        """All versions of all tenants with these digests. For operators only."""
        found: dict[str, list[AdapterVersion]] = {}
        for version in self._catalog.with_digests(digests):
            found.setdefault(version.digest, []).append(version)
        return found

    def digests(self) -> set[str]:
        """The digests of everything stored, whoever has it."""
        return self._catalog.digests()

    # Bytes

    def checkout(self, version: AdapterVersion) -> AbstractContextManager[dict[str, Path]]:
        """Local files of a version by role, to be read only. They stay while the context is open, for a day at most, even if the adapter
        is deleted. Raises BlobCorrupt, StoreUnavailable, StorageFull."""
        return self._checkouts.open(version.blobs)

    def blob(self, tenant: str, sha256: str) -> int | None:
        """Bytes of a blob that the tenant owns: one of its versions has it, or it has uploaded it in the last 24 hours. None for others."""
        return self._blob_records.size(tenant, sha256)

    def open_blob(self, tenant: str, sha256: str) -> BinaryIO:
        """A blob that the tenant owns. Raises BlobNotFound, BlobCorrupt, StorageFull, StoreUnavailable."""
        if self.blob(tenant, sha256) is None:
            raise BlobNotFound(f"you own no blob {sha256[:64]!r}; upload it")
        with self._checkouts.open({"blob": sha256}) as paths:
            return paths["blob"].open("rb")

    def stage_blobs(self, tenant: str, files: Mapping[str, str], staging: Staging) -> None:
        """Put owned blobs (file name → sha256) into an upload, as if sent. Raises BlobNotFound naming the others, BlobCorrupt, UploadTooLarge."""
        absent = [f"{name[:80]!r} ({sha256[:64]})" for name, sha256 in files.items() if self.blob(tenant, sha256) is None]
        if absent:
            raise BlobNotFound(f"you own no such blobs; upload them: {', '.join(absent)}")
        with self._checkouts.open(files) as paths:
            for name, sha256 in files.items():
                with staging.open(name) as writer:
                    for chunk in read_chunks(paths[name]):
                        writer.write(chunk)
                if isinstance(writer, Writer) and writer.sha256 != sha256:
                    raise BlobCorrupt(f"blob {sha256[:12]} is damaged; upload it again")

    def begin_blob(self, tenant: str) -> str:
        """Start a resumable upload of one blob and return its id. Raises TooManyUploads."""
        return self._uploads.begin(tenant)

    def blob_offset(self, tenant: str, upload: str) -> int:
        """Bytes of an upload that have arrived. Raises UploadNotFound."""
        return self._uploads.offset(tenant, upload)

    def append_blob(self, tenant: str, upload: str, offset: int) -> PieceWriter:
        """Go on with an upload; use it as a context manager. Raises UploadNotFound, OffsetMismatch."""
        return self._uploads.append(tenant, upload, offset)

    def finish_blob(self, tenant: str, upload: str, sha256: str) -> int:
        """Store what arrived, which must have this digest; the tenant then owns it for 24 hours. Returns its bytes.
        Raises UploadNotFound, OffsetMismatch, DigestMismatch, StorageFull, StoreUnavailable; the upload is then still there."""
        with self._uploads.complete(tenant, upload, sha256) as path:
            nbytes = path.stat().st_size
            self._put(path, sha256, nbytes)
            self._blob_records.own(tenant, sha256)
        return nbytes

    def cancel_blob(self, tenant: str, upload: str) -> None:
        """Forget an upload. Raises UploadNotFound."""
        self._uploads.cancel(tenant, upload)

    # Changing what names mean

    def set_tag(self, tenant: str, name: str, tag: str, version_reference: str, condition: Condition = ALWAYS) -> AdapterRecord:
        """Make a tag name a version, given as ``v3``, ``sha256:…`` or another tag. Raises AdapterNotFound, InvalidName,
        PreconditionFailed; ``absent`` of the condition is about the tag."""
        return self._catalog.set_tag(tenant, name, check_tag(tag), parse_reference(f"{name}@{version_reference}"), condition)

    def remove_tag(self, tenant: str, name: str, tag: str, condition: Condition = ALWAYS) -> AdapterRecord:
        """Remove a tag other than ``latest``. Raises AdapterNotFound, InvalidName, PreconditionFailed, VersionInUse."""
        return self._catalog.remove_tag(tenant, check_name(name), check_tag(tag), condition)

    def delete(self, tenant: str, reference: str, condition: Condition = ALWAYS) -> list[DeletedVersion]:
        """Remove an adapter or one version of it. Returns what went, newest first. Blobs that nobody uses any more go at a later sweep.
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

    def pin(self, tenant: str, digest: str) -> bool:
        """Want an adapter to stay on the device. False when it was pinned already. Raises AdapterNotFound, PinLimit."""
        return self._pins.add(tenant, digest)

    def unpin(self, tenant: str, digest: str) -> None:
        """Take a pin back; no error when there is none."""
        self._pins.remove(tenant, digest)

    def pins(self) -> set[tuple[str, str]]:
        """(tenant, digest) of every pin."""
        return self._pins.all()

    def pinned_versions(self) -> list[AdapterVersion]:
        """What is pinned, whoever pinned it: a version of each (tenant, digest)."""
        pins = self.pins()
        found = self._catalog.with_digests({digest for _, digest in pins})
        return list({(item.tenant, item.digest): item for item in found if (item.tenant, item.digest) in pins}.values())

    def touch(self, used: Mapping[tuple[str, str, int], float]) -> None:
        """Write down when versions (tenant, name, number) were last used, in seconds since the epoch."""
        self._catalog.touch(used)

    # Care

    def sweep(self) -> Swept:
        """Remove what nobody needs and nobody has touched for an hour, or a day. Safe beside everything else, and on several replicas at
        once. Raises StoreUnavailable, having done a part."""
        hour_ago, day_ago = self._database.now() - UNTOUCHED_S, self._database.now() - OWNED_S
        leftovers = self._blobs.clear(hour_ago) + clear_directories(self._staging, hour_ago) + self._checkouts.clear(day_ago)
        uploads = self._uploads.sweep(day_ago)
        self._idempotency.expire()
        self._blob_records.expire()
        blobs = sum(self._blob_records.remove(sha256, self._blobs.delete) for sha256 in self._blob_records.orphans())
        return Swept(blobs, uploads, leftovers)

    def _stored(
        self, tenant: str, name: str, staged: StagedAdapter, facts: dict[str, Any], tag: str, condition: Condition
    ) -> Publication:
        """What to publish, once its blobs are stored."""
        check_name(name)
        check_tag(tag)
        for file in staged.files:
            self._put(file.path, file.sha256, file.nbytes)
        files = tuple(VersionFile(file.role, file.name, file.sha256, file.nbytes) for file in staged.files)
        return Publication(tenant, name, staged.digest, files, facts, tag, condition)

    def _put(self, path: Path, sha256: str, nbytes: int) -> None:
        """Store a file's bytes; their row first (see blob_records)."""
        fresh = self._blob_records.note(sha256, nbytes)
        self._blobs.put(path, sha256, fresh=fresh)
