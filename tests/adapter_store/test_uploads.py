"""Resumable uploads: pieces, broken connections, restarts, tenants apart."""

from __future__ import annotations

import fcntl
import hashlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapter_store.errors import (
    DigestMismatch,
    OffsetMismatch,
    StorageFull,
    TooManyUploads,
    UploadNotFound,
    UploadTooLarge,
)
from adapter_store.uploads import MAX_UNFINISHED, Uploads


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    return Uploads(tmp_path / "partial", 1000)


def send(uploads: Uploads, upload: str, offset: int, data: bytes, tenant: str = "acme") -> int:
    with uploads.append(tenant, upload, offset) as writer:
        writer.write(data)
    return writer.offset


def test_pieces_make_a_whole(uploads: Uploads) -> None:
    upload = uploads.begin("acme")
    assert uploads.offset("acme", upload) == 0
    assert send(uploads, upload, 0, b"hel") == 3
    assert send(uploads, upload, 3, b"lo") == 5
    with uploads.complete("acme", upload, hashlib.sha256(b"hello").hexdigest()) as path:
        assert path.read_bytes() == b"hello"
    with pytest.raises(UploadNotFound):
        uploads.offset("acme", upload)


def test_what_came_before_a_connection_broke_counts_and_outlives_a_restart(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, 1000)
    upload = uploads.begin("acme")
    with uploads.append("acme", upload, 0) as writer:
        writer.write(b"he")
        writer.write(b"l")
    again = Uploads(tmp_path, 1000)
    assert again.offset("acme", upload) == 3
    with pytest.raises(OffsetMismatch) as caught:
        again.append("acme", upload, 2)
    assert caught.value.offset == 3
    assert send(again, upload, 3, b"lo") == 5


def test_another_digest_is_refused_and_the_upload_stays(uploads: Uploads) -> None:
    upload = uploads.begin("acme")
    send(uploads, upload, 0, b"hell")
    right = hashlib.sha256(b"hello").hexdigest()
    for wrong in (right, "", "x" * 1000):
        with pytest.raises(DigestMismatch), uploads.complete("acme", upload, wrong):
            raise AssertionError("complete with another digest")
    send(uploads, upload, 4, b"o")
    with uploads.complete("acme", upload, right):
        pass


def test_what_fails_behind_a_complete_upload_may_be_tried_again(uploads: Uploads) -> None:
    upload = uploads.begin("acme")
    nothing = hashlib.sha256(b"").hexdigest()
    with pytest.raises(StorageFull), uploads.complete("acme", upload, nothing):
        raise StorageFull("no space")
    with uploads.complete("acme", upload, nothing) as path:
        assert path.read_bytes() == b""


def test_another_tenants_upload_is_one_that_is_not_there(uploads: Uploads) -> None:
    upload = uploads.begin("acme")
    calls: list[Callable[[str, str], object]] = [
        uploads.offset,
        lambda tenant, name: uploads.append(tenant, name, 0),
        lambda tenant, name: uploads.complete(tenant, name, "0" * 64).__enter__(),
        uploads.cancel,
    ]
    for call in calls:
        messages = set()
        for tenant, name in [("other", upload), ("acme", "0" * 32), ("acme", "../x"), ("acme", "-"), ("acme", upload.upper())]:
            with pytest.raises(UploadNotFound) as caught:
                call(tenant, name)
            messages.add(str(caught.value).replace(name[:32], "ID"))
        assert len(messages) == 1
    assert uploads.offset("acme", upload) == 0


def test_two_cannot_write_at_once(uploads: Uploads) -> None:
    upload = uploads.begin("acme")
    with uploads.append("acme", upload, 0) as writer:
        writer.write(b"he")
        for call in (lambda: uploads.append("acme", upload, 2), lambda: uploads.complete("acme", upload, "").__enter__()):
            with pytest.raises(OffsetMismatch) as caught:
                call()
            assert caught.value.offset == 2
        assert uploads.sweep(math.inf) == 0
    assert send(uploads, upload, 2, b"llo") == 5


def test_the_byte_cap_keeps_what_fits(uploads: Uploads) -> None:
    upload = uploads.begin("acme")
    with uploads.append("acme", upload, 0) as writer:
        writer.write(b"x" * 999)
        with pytest.raises(UploadTooLarge):
            writer.write(b"xx")
    assert uploads.offset("acme", upload) == 999


def test_a_tenant_has_so_many_unfinished_uploads(uploads: Uploads) -> None:
    def begin(_: int) -> str | None:
        try:
            return uploads.begin("acme")
        except TooManyUploads:
            return None

    with ThreadPoolExecutor(8) as pool:
        begun = [upload for upload in pool.map(begin, range(MAX_UNFINISHED + 8)) if upload]
    assert len(set(begun)) == MAX_UNFINISHED
    uploads.begin("other")
    uploads.cancel("acme", begun[0])
    uploads.begin("acme")


def test_stale_uploads_are_swept(uploads: Uploads, tmp_path: Path) -> None:
    stale, live = uploads.begin("acme"), uploads.begin("acme")
    old = next((tmp_path / "partial").glob(f"*{stale}"))
    os.utime(old, (0, 0))
    assert uploads.sweep(time.time() - 60) == 1
    with pytest.raises(UploadNotFound):
        uploads.offset("acme", stale)
    assert uploads.offset("acme", live) == 0


def test_an_upload_that_goes_while_it_is_opened_is_not_found(uploads: Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = uploads.begin("acme")
    lock = fcntl.flock

    def gone(file: object, kind: int) -> None:
        uploads.cancel("acme", upload)
        lock(file, kind)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", gone)
    with pytest.raises(UploadNotFound):
        uploads.append("acme", upload, 0)


def test_a_quota_is_storage_full_and_the_upload_goes_on_later(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow beyond 100 bytes."""
    uploads = Uploads(tmp_path, 1000)
    upload = uploads.begin("acme")
    program = f"""
import resource
from pathlib import Path
from adapter_store.errors import StorageFull
from adapter_store.uploads import Uploads
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
with Uploads(Path({str(tmp_path)!r}), 1000).append("acme", {upload!r}, 0) as writer:
    try:
        writer.write(b"x" * 150)
    except StorageFull:
        raise SystemExit(writer.offset)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 100
    assert send(uploads, upload, 100, b"x" * 50) == 150
