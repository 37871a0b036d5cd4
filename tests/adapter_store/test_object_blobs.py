"""The object store behind its cache: copies that are checked, one download at a time, and a store that fails."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import GenericError
from obstore.store import MemoryStore

from adapter_store.blob_cache import BlobCache
from adapter_store.breaker import Breaker
from adapter_store.errors import BlobCorrupt, StorageFull, StoreError, StoreUnavailable
from adapter_store.object_blobs import ObjectBlobs
from tests.seaweed import BUCKET, Seaweed


class Counted:
    """Stands before ``obstore.get``: counts downloads, makes them slow, or lets them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.delay_s = 0.0
        self.error: Exception | None = None
        self._get = obstore.get
        monkeypatch.setattr(obstore, "get", self)

    def __call__(self, store: Any, key: str) -> Any:
        self.calls += 1
        time.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        return self._get(store, key)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def make(directory: Path, *, max_bytes: int = 1 << 20, store: MemoryStore | None = None) -> ObjectBlobs:
    store = store or MemoryStore()
    return ObjectBlobs(store, store, store, BlobCache(directory / "cache", max_bytes))


def put(blobs: ObjectBlobs, directory: Path, content: bytes) -> str:
    path = directory / f"source-{uuid.uuid4().hex}"
    path.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    blobs.put(path, sha256)
    return sha256


def get(blobs: ObjectBlobs, directory: Path, sha256: str) -> bytes:
    target = directory / f"target-{uuid.uuid4().hex}"
    blobs.link(sha256, target)
    return target.read_bytes()


def copies(directory: Path) -> set[str]:
    return {path.name for path in (directory / "cache").glob("??/*")}


def test_one_download_serves_everybody(tmp_path: Path, downloads: Counted) -> None:
    blobs = make(tmp_path)
    sha256 = put(blobs, tmp_path, b"hello")
    downloads.delay_s = 0.1
    with ThreadPoolExecutor(32) as pool:
        assert set(pool.map(lambda _: get(blobs, tmp_path, sha256), range(32))) == {b"hello"}
    assert downloads.calls == 1


def test_a_failed_download_fails_everybody_who_waits_and_is_tried_again(tmp_path: Path, downloads: Counted) -> None:
    blobs = make(tmp_path)
    sha256 = put(blobs, tmp_path, b"hello")
    downloads.delay_s, downloads.error = 0.2, GenericError("no")

    def refused(_: int) -> bool:
        with pytest.raises(StoreUnavailable):
            get(blobs, tmp_path, sha256)
        return True

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(refused, range(16)))
    assert downloads.calls <= 3
    downloads.error = None
    assert get(make(tmp_path, store=blobs._quick), tmp_path, sha256) == b"hello"


def test_a_copy_is_checked_once_in_a_process(tmp_path: Path, downloads: Counted) -> None:
    store = MemoryStore()
    sha256 = put(make(tmp_path, store=store), tmp_path, b"hello")
    assert get(make(tmp_path, store=store), tmp_path, sha256) == b"hello"
    again = make(tmp_path, store=store)
    assert get(again, tmp_path, sha256) == b"hello"
    assert downloads.calls == 1
    copy = tmp_path / "cache" / sha256[:2] / sha256
    copy.unlink()
    copy.write_bytes(b"jello")
    assert get(make(tmp_path, store=store), tmp_path, sha256) == b"hello"
    assert copy.read_bytes() == b"hello"
    assert downloads.calls == 2


def test_a_copy_that_another_process_evicted_is_fetched_again(tmp_path: Path, downloads: Counted) -> None:
    blobs = make(tmp_path)
    sha256 = put(blobs, tmp_path, b"hello")
    get(blobs, tmp_path, sha256)
    (tmp_path / "cache" / sha256[:2] / sha256).unlink()
    assert get(blobs, tmp_path, sha256) == b"hello"
    assert downloads.calls == 2


def test_a_link_that_cannot_be_made_is_no_reason_to_download_again(tmp_path: Path, downloads: Counted) -> None:
    blobs = make(tmp_path)
    sha256 = put(blobs, tmp_path, b"hello")
    with pytest.raises(FileNotFoundError):
        blobs.link(sha256, tmp_path / "no such directory" / "target")
    (tmp_path / "cache" / "xx").mkdir()
    (tmp_path / "cache" / "xx" / "not a blob").touch()
    assert get(make(tmp_path, max_bytes=1, store=blobs._quick), tmp_path, sha256) == b"hello"
    assert downloads.calls == 1


def test_the_least_recently_used_copy_goes_and_links_stay(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 250)
    store = MemoryStore()
    blobs = ObjectBlobs(store, store, store, cache)
    first, second, third = (put(blobs, tmp_path, letter * 100) for letter in (b"a", b"b", b"c"))
    blobs.link(second, tmp_path / "held")
    get(blobs, tmp_path, first)
    get(blobs, tmp_path, third)
    assert copies(tmp_path) == {first, third}
    assert cache.nbytes == 200
    assert (tmp_path / "held").read_bytes() == b"b" * 100
    # The next process finds what is there, and its order.
    os.utime(tmp_path / "cache" / third[:2] / third, (0, 0))
    later = make(tmp_path, max_bytes=250, store=store)
    get(later, tmp_path, second)
    assert copies(tmp_path) == {first, second}


def test_a_blob_over_the_budget_is_served_all_the_same(tmp_path: Path, downloads: Counted) -> None:
    blobs = make(tmp_path, max_bytes=10)
    small, large = put(blobs, tmp_path, b"small"), put(blobs, tmp_path, b"large" * 100)
    get(blobs, tmp_path, small)
    assert get(blobs, tmp_path, large) == b"large" * 100
    assert copies(tmp_path) == {large}


def test_a_damaged_object_is_not_served(tmp_path: Path) -> None:
    blobs = make(tmp_path)
    sha256 = put(blobs, tmp_path, b"hello")
    obstore.put(blobs._quick, f"sha256/{sha256[:2]}/{sha256}", b"jello")
    with pytest.raises(BlobCorrupt):
        get(blobs, tmp_path, sha256)
    assert copies(tmp_path) == set()
    assert blobs.clear(math.inf) == 0


def test_a_missing_object_is_an_answer_and_no_reason_to_stop_asking(tmp_path: Path) -> None:
    blobs = make(tmp_path)
    sha256 = put(blobs, tmp_path, b"hello")
    for digit in "0123456789":
        with pytest.raises(BlobCorrupt):
            get(blobs, tmp_path, digit * 64)
    assert get(blobs, tmp_path, sha256) == b"hello"


def test_a_download_that_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = make(tmp_path)
    sha256 = put(blobs, tmp_path, b"hello")

    class Broken:
        def stream(self, min_chunk_size: int) -> Iterator[bytes]:
            yield b"he"
            raise GenericError("connection reset")

    monkeypatch.setattr(obstore, "get", lambda *_: Broken())
    with pytest.raises(StoreUnavailable):
        get(blobs, tmp_path, sha256)
    assert copies(tmp_path) == set()


def test_a_full_disk_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = make(tmp_path)
    sha256 = put(blobs, tmp_path, b"hello")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFull):
            get(blobs, tmp_path, sha256)
    assert copies(tmp_path) == set()
    assert get(blobs, tmp_path, sha256) == b"hello"


def test_the_breaker_lets_one_try(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    breaker = Breaker("the store", failures=2, rest_s=1, longest_s=4)
    tried = 0

    def attempt(error: Exception | None) -> None:
        nonlocal tried
        with breaker.attempt():
            tried += 1
            if error:
                raise error

    down = StoreUnavailable("down")
    for _ in range(5):
        with pytest.raises(StoreUnavailable):
            attempt(down)
    assert tried == 2
    for rest in (1.5, 3, 6, 6, 6):
        now[0] += rest + 0.01
        for _ in range(5):
            with pytest.raises(StoreUnavailable):
                attempt(down)
    assert tried == 7
    now[0] += 6.01
    attempt(None)
    attempt(None)
    with pytest.raises(BlobCorrupt):
        attempt(BlobCorrupt("an answer"))
    assert tried == 10


@pytest.fixture
def remote(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place in a real store, which the environment leads to."""
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def elapsed_of_refusals(blobs: ObjectBlobs, directory: Path, count: int) -> float:
    """Seconds until ``count`` threads, each with a blob of its own that is not at hand, have been refused."""
    start = time.monotonic()

    def refused(index: int) -> None:
        with pytest.raises(StoreUnavailable):
            get(blobs, directory, f"{index:064x}")

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(refused, range(count)))
    return time.monotonic() - start


def test_while_the_store_is_silent_copies_are_served_and_nobody_piles_up(tmp_path: Path, seaweed: Seaweed, remote: str) -> None:
    blobs = ObjectBlobs.from_url(remote, BlobCache(tmp_path / "cache", 1 << 20))
    near, far = put(blobs, tmp_path, b"near"), put(blobs, tmp_path, b"far")
    get(blobs, tmp_path, near)
    threads = threading.active_count()
    with seaweed.silent():
        assert elapsed_of_refusals(blobs, tmp_path, 16) < 30
        # From now on the breaker answers.
        assert elapsed_of_refusals(blobs, tmp_path, 64) < 5
        assert get(blobs, tmp_path, near) == b"near"
    assert threading.active_count() <= threads
    for _ in range(100):
        try:
            assert get(blobs, tmp_path, far) == b"far"
            break
        except StoreUnavailable:
            time.sleep(0.1)
    else:
        raise AssertionError("the store came back and was not asked")


def test_a_refused_connection_is_said_at_once(tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    blobs = ObjectBlobs.from_url(remote, BlobCache(tmp_path / "cache", 1 << 20))
    assert elapsed_of_refusals(blobs, tmp_path, 8) < 30


@pytest.mark.parametrize(
    ("name", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody"), ("bucket", "no-such-bucket")]
)
def test_what_only_an_operator_can_mend_is_no_corruption(
    tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    url = f"s3://{value}/x" if name == "bucket" else remote
    monkeypatch.setenv(name, value)
    blobs = ObjectBlobs.from_url(url, BlobCache(tmp_path / "cache", 1 << 20))
    with pytest.raises(StoreUnavailable):
        get(blobs, tmp_path, "0" * 64)


def test_plain_http_is_spoken_only_where_the_endpoint_says_so(
    tmp_path: Path, seaweed: Seaweed, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.environment["AWS_ENDPOINT_URL"].replace("http:", "https:"))
    with pytest.raises(StoreUnavailable):
        put(ObjectBlobs.from_url(remote, BlobCache(tmp_path / "cache", 1 << 20)), tmp_path, b"hello")


@pytest.mark.parametrize("url", ["gs://bucket/x", "s3://", "s3:///x", "/directory", "https://bucket.example.com/x"])
def test_other_urls_are_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(StoreError, match="s3://bucket/prefix"):
        ObjectBlobs.from_url(url, BlobCache(tmp_path / "cache", 1 << 20))
