"""The store: one façade over blobs and catalog. Synchronous and thread-safe; callers on an event loop use threads.

<directory>/
  catalog.sqlite   names and versions
  blobs/           content-addressed files (see blobs)
  uploads/         uploads under way
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapter_store.blobs import BlobStore, LocalBlobs
from adapter_store.catalog import AdapterRecord, AdapterVersion, Catalog
from adapter_store.errors import AdapterNotFound, AdapterRejected, Fault, InvalidName
from adapter_store.manifest import Reference, check_name, parse_reference
from adapter_store.staging import StagedAdapter, StagedFile, Staging

__all__ = ["AdapterRecord", "AdapterVersion", "Store"]


class Store:
    """Adapters of all tenants. What one tenant asks never shows another's."""

    def __init__(self, catalog: Catalog, blobs: BlobStore, uploads: Path, max_upload_bytes: int) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._uploads = uploads
        self._max_upload_bytes = max_upload_bytes

    @classmethod
    def open(cls, directory: Path, max_upload_bytes: int = 1 << 30) -> Store:
        """Open or create a store in a local directory, and clear what a crash left of uploads."""
        directory.mkdir(parents=True, exist_ok=True)
        store = cls(
            Catalog(f"sqlite:///{directory / 'catalog.sqlite'}"),
            LocalBlobs(directory / "blobs"),
            directory / "uploads",
            max_upload_bytes,
        )
        store.sweep()
        return store

    def close(self) -> None:
        self._catalog.close()

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
                version = self._catalog.resolve(tenant, Reference(check_name(name)))
            except (AdapterNotFound, InvalidName):
                message = f"store the adapter that the fusion calls {name[:64]!r} under this name first"
                faults.append(Fault("missing_child", "adapter_fusion_config.json: name", message, found=name[:64]))
                continue
            for role in ("config", "weights"):
                path = self._blobs.path(version.blobs[role])
                files.append(StagedFile(f"child/{name}/{role}", path, version.blobs[role], path.stat().st_size))
        if faults:
            raise AdapterRejected(faults)
        return staged.with_files(files) if files else staged

    def commit(self, tenant: str, name: str, staged: StagedAdapter, facts: dict[str, Any]) -> AdapterVersion:
        """Publish a checked upload under a name. Blobs first, then one transaction that makes them visible."""
        check_name(name)
        for file in staged.files:
            self._blobs.put(file.path, file.sha256)
        return self._catalog.publish(
            tenant,
            name,
            staged.digest,
            sum(file.nbytes for file in staged.files),
            {file.role: file.sha256 for file in staged.files},
            facts,
        )

    def resolve(self, tenant: str, reference: str) -> AdapterVersion:
        """The version that ``name``, ``name@v3`` or ``name@sha256:…`` means. Raises AdapterNotFound, InvalidName."""
        return self._catalog.resolve(tenant, parse_reference(reference))

    def get(self, tenant: str, name: str) -> AdapterRecord:
        return self._catalog.get(tenant, check_name(name))

    def records(self, tenant: str, limit: int = 100, after: str = "") -> tuple[AdapterRecord, ...]:
        return self._catalog.records(tenant, limit, after)

    def delete(self, tenant: str, reference: str) -> list[AdapterVersion]:
        """Remove a name or one version of it. Blobs that nobody uses any more go at the next sweep."""
        return self._catalog.remove(tenant, parse_reference(reference))

    def has_digest(self, digest: str) -> bool:
        """Whether any tenant has an adapter of these files. For the server's own care of what it made of them, never for an answer."""
        return self._catalog.has_digest(digest)

    def digests(self) -> set[str]:
        """The digests of everything stored, whoever has it."""
        return self._catalog.digests()

    def names_of(self, digests: Collection[str]) -> dict[str, list[AdapterVersion]]:
        """All versions of all tenants with these digests. For operators only."""
        return self._catalog.names_of(digests)

    def files(self, version: AdapterVersion) -> dict[str, Path]:
        """Local files of a version by role."""
        return {role: self._blobs.path(sha256) for role, sha256 in version.blobs.items()}

    @contextmanager
    def checkout(self, version: AdapterVersion) -> Iterator[dict[str, Path]]:
        """Local files of a version by role, while the context is open."""
        yield self.files(version)

    def sweep(self) -> int:
        """Remove blobs that no version names and uploads that nobody finishes. Only while no upload is under way. Returns how many blobs."""
        shutil.rmtree(self._uploads, ignore_errors=True)
        self._uploads.mkdir(parents=True, exist_ok=True)
        orphans = set(self._blobs.digests()) - self._catalog.used_blobs()
        for sha256 in orphans:
            self._blobs.delete(sha256)
        return len(orphans)
