"""What every blob store must do, on a directory, on a real S3-compatible store and on one in memory."""

from __future__ import annotations

import hashlib
import math
import os
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from adapter_store.blob_cache import BlobCache
from adapter_store.blobs import BlobStore, LocalBlobs
from adapter_store.errors import BlobCorrupt, StoreError
from adapter_store.object_blobs import ObjectBlobs
from tests.seaweed import BUCKET, Seaweed

Sourced = tuple[Path, str]


def in_directory(root: Path, _request: pytest.FixtureRequest) -> BlobStore:
    return LocalBlobs(root)


def in_memory(root: Path, _request: pytest.FixtureRequest) -> BlobStore:
    store = MemoryStore()
    return ObjectBlobs(store, store, store, BlobCache(root, 1 << 30))


def in_seaweed(root: Path, request: pytest.FixtureRequest) -> BlobStore:
    seaweed: Seaweed = request.getfixturevalue("seaweed")
    monkeypatch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return ObjectBlobs.from_url(f"s3://{BUCKET}/{uuid.uuid4().hex}", BlobCache(root, 1 << 30))


@pytest.fixture(params=[in_directory, in_memory, in_seaweed])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    make: Callable[[Path, pytest.FixtureRequest], BlobStore] = request.param
    return make(tmp_path / "blobs", request)


def source(directory: Path, content: bytes) -> Sourced:
    """A file and its digest."""
    path = directory / f"source-{uuid.uuid4().hex}"
    path.write_bytes(content)
    return path, hashlib.sha256(content).hexdigest()


def content_of(blobs: BlobStore, sha256: str, directory: Path) -> bytes:
    target = directory / f"target-{uuid.uuid4().hex}"
    blobs.link(sha256, target)
    return target.read_bytes()


@pytest.mark.parametrize("content", [b"", b"hello", os.urandom((17 << 20) + 1)], ids=["empty", "small", "several parts"])
def test_what_was_put_can_be_had(blobs: BlobStore, tmp_path: Path, content: bytes) -> None:
    path, sha256 = source(tmp_path, content)
    blobs.put(path, sha256)
    assert content_of(blobs, sha256, tmp_path) == content
    assert blobs.size(sha256) == len(content)
    assert blobs.size("0" * 64) is None


@pytest.mark.parametrize("fresh", [True, False])
def test_putting_twice_is_no_error(blobs: BlobStore, tmp_path: Path, fresh: bool) -> None:
    path, sha256 = source(tmp_path, b"hello")
    blobs.put(path, sha256, fresh=fresh)
    blobs.put(path, sha256, fresh=fresh)
    assert content_of(blobs, sha256, tmp_path) == b"hello"


def test_what_is_known_but_gone_is_written_again(blobs: BlobStore, tmp_path: Path) -> None:
    path, sha256 = source(tmp_path, b"hello")
    blobs.put(path, sha256)
    blobs.delete(sha256)
    blobs.put(path, sha256, fresh=False)
    assert content_of(blobs, sha256, tmp_path) == b"hello"


@pytest.mark.parametrize("fresh", [True, False])
def test_bytes_with_another_digest_are_not_stored(blobs: BlobStore, tmp_path: Path, fresh: bool) -> None:
    path, _ = source(tmp_path, b"hello")
    with pytest.raises(BlobCorrupt):
        blobs.put(path, "0" * 64, fresh=fresh)
    assert blobs.size("0" * 64) is None
    with pytest.raises(BlobCorrupt, match="missing"):
        content_of(blobs, "0" * 64, tmp_path)
    assert blobs.clear(math.inf) == 0


def test_a_blob_that_goes_leaves_links_whole(blobs: BlobStore, tmp_path: Path) -> None:
    path, sha256 = source(tmp_path, b"hello")
    blobs.put(path, sha256)
    blobs.link(sha256, tmp_path / "link")
    blobs.delete(sha256)
    blobs.delete(sha256)
    assert (tmp_path / "link").read_bytes() == b"hello"
    assert blobs.size(sha256) is None
    with pytest.raises(BlobCorrupt, match="missing"):
        content_of(blobs, sha256, tmp_path)


def test_many_threads_put_and_get_the_same_bytes(blobs: BlobStore, tmp_path: Path) -> None:
    sources = [source(tmp_path, b"x" * 100_000) for _ in range(32)]
    sha256 = sources[0][1]

    def put_and_get(index: int) -> bytes:
        blobs.put(sources[index][0], sha256, fresh=index % 2 == 0)
        return content_of(blobs, sha256, tmp_path)

    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(put_and_get, range(32))) == {b"x" * 100_000}
    assert blobs.size(sha256) == 100_000
    assert blobs.clear(math.inf) == 0


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_only_digests_name_blobs(blobs: BlobStore, tmp_path: Path, name: str) -> None:
    path, _ = source(tmp_path, b"hello")
    calls = [
        lambda: blobs.put(path, name),
        lambda: blobs.size(name),
        lambda: blobs.link(name, tmp_path / "x"),
        lambda: blobs.delete(name),
    ]
    for call in calls:
        with pytest.raises(StoreError):
            call()


def test_what_a_crash_left_goes_when_it_is_old(blobs: BlobStore, tmp_path: Path) -> None:
    path, sha256 = source(tmp_path, b"hello")
    blobs.put(path, sha256)
    blobs.link(sha256, tmp_path / "link")
    root = next((tmp_path / "blobs").rglob(sha256)).parent
    (root / f".{sha256}.1.abcdef").write_bytes(b"hel")
    assert blobs.clear(time.time() - 60) == 0
    assert blobs.clear(math.inf) == 1
    assert content_of(blobs, sha256, tmp_path) == b"hello"


def test_a_blob_that_the_disk_has_changed_is_not_linked(tmp_path: Path) -> None:
    """Found by the next process, which reads a blob before it uses it for the first time."""
    path, sha256 = source(tmp_path, b"hello")
    LocalBlobs(tmp_path / "blobs").put(path, sha256)
    next((tmp_path / "blobs").rglob(sha256)).write_bytes(b"jello")
    blobs = LocalBlobs(tmp_path / "blobs")
    for _ in range(2):
        with pytest.raises(BlobCorrupt, match="damaged"):
            blobs.link(sha256, tmp_path / "link")
        assert not (tmp_path / "link").exists()
    blobs.put(path, sha256, fresh=False)
    assert content_of(blobs, sha256, tmp_path) == b"hello"


def test_a_damaged_blob_in_a_directory_is_mended_by_putting_it_again(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path / "blobs")
    path, sha256 = source(tmp_path, b"hello")
    blobs.put(path, sha256)
    next((tmp_path / "blobs").rglob(sha256)).write_bytes(b"jello")
    blobs.put(path, sha256, fresh=False)
    assert content_of(blobs, sha256, tmp_path) == b"hello"
