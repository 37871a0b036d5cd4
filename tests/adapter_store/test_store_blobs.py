"""Bytes in the store: checkouts that stay, blobs that a tenant owns, disks that are full, and sweeps beside uploads."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapter_store.errors import (
    AdapterNotFound,
    BlobCorrupt,
    BlobNotFound,
    DigestMismatch,
    StorageFull,
    StoreError,
    StoreUnavailable,
    UploadNotFound,
)
from adapter_store.store import AdapterVersion, Store, Swept
from tests.adapter_store.test_store import contents, push, read
from tests.adapter_store.uploads import good
from tests.postgres import fresh_database
from tests.seaweed import BUCKET, Seaweed

DAY = 24 * 3600.0


class Clock:
    """The time, which can be moved on."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def remote(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["directory", "seaweed"])
def store(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Store]:
    url = request.getfixturevalue("remote") if request.param == "seaweed" else None
    store = Store.open(tmp_path / "store", clock=clock, blobs_url=url, max_upload_bytes=1 << 20)
    yield store
    store.close()


def upload(store: Store, tenant: str, content: bytes) -> str:
    """Send a blob in pieces."""
    name, sha256 = store.begin_blob(tenant), hashlib.sha256(content).hexdigest()
    for start in range(0, len(content), 100):
        with store.append_blob(tenant, name, start) as writer:
            writer.write(content[start : start + 100])
    assert store.finish_blob(tenant, name, sha256) == len(content)
    return sha256


def left_of_uploads(directory: Path) -> list[Path]:
    found = [path for name in ("uploads", "partial", "checkouts") for path in (directory / name).iterdir()]
    return found + [path for path in directory.rglob(".*") if path.is_file()]


def test_a_checkout_stays_while_it_is_open(store: Store, tmp_path: Path, clock: Clock) -> None:
    version = push(store, "acme", "bot", 1)
    with store.checkout(version) as paths:
        store.delete("acme", "bot")
        clock.ahead = 3700
        assert store.sweep() == Swept(2, 0, 0)
        assert {role: path.read_bytes() for role, path in paths.items()} == contents(1)
    with pytest.raises(BlobCorrupt), store.checkout(version):
        raise AssertionError("the blobs are gone")
    assert left_of_uploads(tmp_path / "store") == []


def test_a_checkout_that_finds_no_space_says_so(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = push(store, "acme", "bot", 1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("mkdir", "link"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            for call in (lambda: store.checkout(version).__enter__(), lambda: store.open_blob("acme", version.blobs["config"])):
                with pytest.raises(StorageFull):
                    call()
    assert left_of_uploads(tmp_path / "store") == []
    # What goes wrong with the files afterwards is not the store's.
    with pytest.raises(OSError, match="device"), store.checkout(version):
        full()


def test_a_silent_blob_store_does_not_keep_others_from_writing(
    tmp_path: Path, clock: Clock, seaweed: Seaweed, remote: str
) -> None:
    """A sweep holds the catalog's lock while it deletes an object."""
    store = Store.open(tmp_path / "store", clock=clock, blobs_url=remote)
    doomed, kept = push(store, "acme", "doomed", 1), push(store, "acme", "kept", 2)
    store.delete("acme", "doomed")
    clock.ahead = 3700
    with seaweed.silent(), ThreadPoolExecutor(1) as pool:
        sweep = pool.submit(store.sweep)
        started = time.monotonic()
        while not sweep.done():
            store.touch({("acme", "kept", 1): kept.created + 1})
        assert time.monotonic() - started < 30
        with pytest.raises(StoreUnavailable):
            sweep.result()
    assert store.blob("acme", doomed.blobs["weights"]) is None
    store.close()


def test_checkouts_that_a_crash_left_go_after_a_day(store: Store, tmp_path: Path, clock: Clock) -> None:
    with store.checkout(push(store, "acme", "bot", 1)):
        clock.ahead = DAY / 2
        assert store.sweep().leftovers == 0
        clock.ahead = DAY + 60
        assert store.sweep().leftovers == 1


def test_a_tenant_owns_what_its_versions_have(store: Store, clock: Clock) -> None:
    push(store, "acme", "bot", 1)
    clock.ahead = 2 * DAY
    store.sweep()
    for content in contents(1).values():
        sha256 = hashlib.sha256(content).hexdigest()
        assert store.blob("acme", sha256) == len(content)
        with store.open_blob("acme", sha256) as reader:
            assert reader.read() == content
        for tenant, name in (("other", sha256), ("acme", "0" * 64), ("acme", "../x"), ("acme", "")):
            assert store.blob(tenant, name) is None
            with pytest.raises(BlobNotFound):
                store.open_blob(tenant, name)
    store.delete("acme", "bot")
    assert store.blob("acme", sha256) is None


def test_a_tenant_owns_what_it_uploaded_for_a_day(store: Store, clock: Clock) -> None:
    sha256 = upload(store, "acme", b"x" * 250)
    assert (store.blob("acme", sha256), store.blob("other", sha256)) == (250, None)
    clock.ahead = DAY - 60
    assert store.sweep().blobs == 0
    assert store.blob("acme", sha256) == 250
    clock.ahead = DAY + 60
    assert store.blob("acme", sha256) is None
    assert store.sweep().blobs == 1


def test_a_digest_that_others_have_must_be_proved_by_the_bytes(store: Store) -> None:
    """Knowing a digest gives nothing: neither an answer nor the blob."""
    sha256 = upload(store, "acme", b"secret")
    with store.begin_upload() as staging, pytest.raises(BlobNotFound, match=sha256):
        store.stage_blobs("other", {"adapter_config.json": sha256}, staging)
    name = store.begin_blob("other")
    with pytest.raises(DigestMismatch):
        store.finish_blob("other", name, sha256)
    assert store.blob("other", sha256) is None
    store.cancel_blob("other", name)
    with pytest.raises(UploadNotFound):
        store.blob_offset("other", name)
    assert upload(store, "other", b"secret") == sha256
    assert store.blob("other", sha256) == 6


def test_owned_blobs_make_an_adapter_as_if_they_had_been_sent(store: Store) -> None:
    sent = push(store, "acme", "bot", 1)
    claimed = {file.name: file.sha256 for file in sent.files}
    with store.begin_upload() as staging:
        store.stage_blobs("acme", claimed, staging)
        again = store.commit("acme", "twin", staging.finish(), {})
    assert (again.digest, again.files) == (sent.digest, sent.files)
    with store.begin_upload() as staging, pytest.raises(BlobNotFound) as caught:
        store.stage_blobs("acme", {**claimed, "head_config.json": "0" * 64, "labels.json": "1" * 64}, staging)
    assert "0" * 64 in str(caught.value)
    assert "1" * 64 in str(caught.value)


def test_a_damaged_blob_is_not_staged(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    sha256 = upload(store, "acme", b"hello")
    next((tmp_path / "blobs").rglob(sha256)).write_bytes(b"jello")
    with store.begin_upload() as staging, pytest.raises(BlobCorrupt):
        store.stage_blobs("acme", {"adapter_config.json": sha256}, staging)
    # As the message says: the same bytes once more mend it.
    assert upload(store, "acme", b"hello") == sha256
    with store.open_blob("acme", sha256) as reader:
        assert reader.read() == b"hello"


def test_uploads_go_on_after_a_restart_and_stale_ones_go(tmp_path: Path, clock: Clock) -> None:
    store = Store.open(tmp_path)
    name = store.begin_blob("acme")
    with store.append_blob("acme", name, 0) as writer:
        writer.write(b"hel")
    store.close()
    again = Store.open(tmp_path, clock=clock)
    with again.append_blob("acme", name, again.blob_offset("acme", name)) as writer:
        writer.write(b"lo")
    assert again.finish_blob("acme", name, hashlib.sha256(b"hello").hexdigest()) == 5
    again.begin_blob("acme")
    clock.ahead = DAY / 2
    assert again.sweep().uploads == 0
    clock.ahead = DAY + 60
    assert again.sweep() == Swept(1, 1, 0)


def test_32_pushes_of_the_same_bytes_are_one_version_of_one_blob_each(store: Store, tmp_path: Path) -> None:
    with ThreadPoolExecutor(32) as pool:
        versions = list(pool.map(lambda _: push(store, "acme", "bot", 1), range(32)))
    assert {(version.number, version.digest) for version in versions} == {(1, versions[0].digest)}
    assert read(store, versions[0]) == contents(1)
    assert left_of_uploads(tmp_path / "store") == []


def test_a_full_disk_leaves_nothing_and_the_store_goes_on(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow beyond a size: while they arrive, and while they are stored."""
    program = f"""
import resource
from pathlib import Path
from adapter_store.errors import StorageFull
from adapter_store.store import Store
from tests.adapter_store.test_store import push
from tests.adapter_store.uploads import good
import numpy as np
from safetensors.numpy import save

store = Store.open(Path({str(tmp_path)!r}))
files = good(1)
files["adapter_model.safetensors"] = save({{"a": np.zeros(1 << 20, "f4")}})
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

def limited(nbytes):
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, unlimited[1]))

for early in (True, False):
    try:
        with store.begin_upload() as staging:
            if early:
                limited(1 << 21)
            for name, content in files.items():
                with staging.open(name) as writer:
                    writer.write(content)
            staged = staging.finish()
            limited(1 << 21)
            store.commit("acme", "large", staged, {{}})
            raise SystemExit("a full disk was not noticed")
    except StorageFull:
        limited(unlimited[0])
push(store, "acme", "small", 2)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
    store = Store.open(tmp_path)
    assert read(store, store.resolve("acme", "small")) == contents(2)
    with pytest.raises(AdapterNotFound):
        store.resolve("acme", "large")
    assert left_of_uploads(tmp_path) == []
    assert len([path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]) == 2


@pytest.mark.parametrize(("catalog", "blobs"), [("sqlite", "directory"), ("postgres", "directory"), ("postgres", "seaweed")])
def test_a_sweep_beside_uploads_never_takes_what_somebody_was_told_is_stored(
    catalog: str, blobs: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The sweeper's clock is an hour ahead: to it whatever is not in a version yet is an orphan. An upload may have to be made again."""
    blobs_url = request.getfixturevalue("remote") if blobs == "seaweed" else None
    if catalog == "sqlite":
        race(lambda clock: Store.open(tmp_path / "store", clock=clock, blobs_url=blobs_url))
        return
    with fresh_database(request.getfixturevalue("postgres_server")) as url:
        race(lambda clock: Store.open(tmp_path / "store", clock=clock, blobs_url=blobs_url, catalog_url=url))


def race(open_store: Callable[[Callable[[], float]], Store]) -> None:
    store, sweeper = open_store(time.time), open_store(lambda: time.time() + 3601)
    pushers, rounds = 6, 8
    done = threading.Event()
    swept: list[str] = []

    def push_until_stored(name: str, seed: int) -> AdapterVersion:
        for _ in range(1000):
            try:
                return push(store, "acme", name, seed)
            except StoreUnavailable:
                continue
        raise AssertionError("swept a thousand times")

    def push_and_delete(pusher: int) -> int:
        turn = 0
        while turn < rounds or not swept:
            version = push_until_stored(f"bot-{pusher}", turn % 2)
            assert read(store, version) == contents(turn % 2)
            store.delete("acme", f"bot-{pusher}")
            turn += 1
        push_until_stored(f"bot-{pusher}", 0)
        return pusher

    def sweep() -> None:
        records = sweeper._blob_records
        # Long enough for most uploads, too short for some.
        while not done.wait(0.02):
            # Not the rest of a sweep: the files of uploads under way are not an hour old.
            swept.extend(sha256 for sha256 in records.orphans() if records.remove(sha256, sweeper._blobs.delete))

    try:
        with ThreadPoolExecutor(pushers + 2) as pool:
            sweeps = [pool.submit(sweep) for _ in range(2)]
            try:
                pushed = list(pool.map(push_and_delete, range(pushers)))
            finally:
                done.set()
            for future in sweeps:
                future.result()
        for pusher in pushed:
            assert read(store, store.resolve("acme", f"bot-{pusher}")) == contents(0)
    finally:
        store.close()
        sweeper.close()


def test_an_upload_that_a_sweep_overtook_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, sweeper = Store.open(tmp_path), Store.open(tmp_path, clock=lambda: time.time() + 3601)
    with store.begin_upload() as staging:
        for name, content in good(1).items():
            with staging.open(name) as writer:
                writer.write(content)
        staged = staging.finish()
        publish = store._catalog.publish
        monkeypatch.setattr(store._catalog, "publish", lambda *args: (sweeper.sweep(), publish(*args))[1])
        with pytest.raises(StoreError, match="send it again"):
            store.commit("acme", "bot", staged, {})
