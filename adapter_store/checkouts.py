"""Checkouts: links to blobs for as long as somebody reads them, whatever becomes of the blobs. Knows no tenants and no versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from adapter_store.blobs import BlobStore
from adapter_store.durable import clear_directories, full_disk_is_storage_full


class Checkouts:
    """Links below a directory on the blobs' filesystem. Thread-safe."""

    def __init__(self, root: Path, blobs: BlobStore) -> None:
        self._root = root
        self._root.mkdir(exist_ok=True)
        self._blobs = blobs

    @contextmanager
    def open(self, blobs: Mapping[str, str]) -> Iterator[dict[str, Path]]:
        """Local files of blobs (sha256) by the same keys, to be read only, while the context is open.

        Raises BlobCorrupt, StoreUnavailable, StorageFull.
        """
        with ExitStack() as stack:
            # Not around what the caller does with the files.
            with full_disk_is_storage_full():
                directory = stack.enter_context(TemporaryDirectory(dir=self._root))
                paths = {key: Path(directory, str(place)) for place, key in enumerate(blobs)}
                for key, sha256 in blobs.items():
                    self._blobs.link(sha256, paths[key])
            yield paths

    def clear(self, before: float) -> int:
        """Remove what crashes left before a time, in seconds since the epoch. Returns how many."""
        return clear_directories(self._root, before)
