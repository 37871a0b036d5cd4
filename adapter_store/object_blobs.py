"""Blobs in an S3-compatible store, with verified copies on the local disk in front of it.

``s3://bucket/prefix`` names the place; endpoint, region and credentials are those of the environment (``AWS_ENDPOINT_URL``, ``AWS_REGION``,
``AWS_ACCESS_KEY_ID``, ``AWS_SECRET_ACCESS_KEY``, …). A store that does not answer raises StoreUnavailable after a few tries, and is then left
alone for a moment (breaker); blobs with a local copy go on being served. Objects lie at ``sha256/ab/ab12…``, as in a local directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from adapter_store.blob_cache import BlobCache
from adapter_store.blobs import blob_key, missing
from adapter_store.breaker import Breaker
from adapter_store.durable import CHUNK, digest_of
from adapter_store.errors import BlobCorrupt, StoreError, StoreUnavailable

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_RETRIES: RetryConfig = {
    "max_retries": 2,
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1)},
    "retry_timeout": timedelta(seconds=5),
}
_ONCE: RetryConfig = {"max_retries": 0}
_PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 4


class ObjectBlobs:
    """Blobs in an object store. Uploads are complete or absent; the store checks the digest that each request is signed with."""

    def __init__(self, hasty: ObjectStore, quick: ObjectStore, patient: ObjectStore, cache: BlobCache) -> None:
        """Three clients of the same place: ``hasty`` tries once and deletes, as who deletes holds a lock of the catalog; ``patient``
        waits longer for an answer, and uploads."""
        self._hasty = hasty
        self._quick = quick
        self._patient = patient
        self._cache = cache
        self._breaker = Breaker("the blob store")

    @classmethod
    def from_url(cls, url: str, cache: BlobCache) -> Self:
        """Blobs at ``s3://bucket/prefix``. Asks nobody yet: a store that is down now may be up later. Raises StoreError for another URL."""
        if not re.match("s3://[^/]", url):
            raise StoreError("blobs are kept in a directory or at an URL of s3://bucket/prefix; this URL is another")
        # An upload is silent for as long as its parts are under way, a download never.
        return cls(_client(url, silence_s=3, retry=_ONCE), _client(url, silence_s=5), _client(url, silence_s=60), cache)

    def put(self, source: Path, sha256: str, *, fresh: bool = True) -> None:
        if digest_of(source) != sha256:
            raise BlobCorrupt(f"the bytes that came for blob {sha256[:12]} have another digest")
        if fresh or self.size(sha256) != source.stat().st_size:
            with self._reach():
                obstore.put(self._patient, _key(sha256), source, chunk_size=_PART_BYTES, max_concurrency=_PARTS_AT_ONCE)

    def link(self, sha256: str, target: Path) -> None:
        self._cache.link(sha256, target, self._fetch)

    def size(self, sha256: str) -> int | None:
        with self._reach():
            try:
                return obstore.head(self._quick, _key(sha256))["size"]
            except FileNotFoundError:
                return None

    def delete(self, sha256: str) -> None:
        with self._reach():
            obstore.delete(self._hasty, _key(sha256))
        self._cache.forget(sha256)

    def clear(self, before: float) -> int:
        return self._cache.clear(before)

    def _fetch(self, sha256: str) -> Iterator[bytes]:
        with self._reach():
            try:
                yield from obstore.get(self._quick, _key(sha256)).stream(min_chunk_size=CHUNK)
            except FileNotFoundError as error:
                if "NoSuchBucket" in str(error):
                    raise StoreUnavailable("the bucket of the blob store does not exist") from error
                raise missing(sha256) from error

    @contextmanager
    def _reach(self) -> Iterator[None]:
        """Everything but an answer about an object is a store that cannot be reached, wrong credentials included: no push mends those."""
        with self._breaker.attempt():
            try:
                yield
            except (BaseError, FileNotFoundError) as error:
                raise StoreUnavailable("the blob store cannot be reached, or refuses our requests") from error


def _key(sha256: str) -> str:
    return f"sha256/{blob_key(sha256)}"


def _client(url: str, silence_s: float, retry: RetryConfig = _RETRIES) -> S3Store:
    """A client that gives up on a connection after ``silence_s`` without a byte; plain HTTP only where the endpoint says so."""
    endpoint = next((os.environ[name] for name in _ENDPOINTS if name in os.environ), "")
    options: ClientConfig = {
        "allow_http": endpoint.startswith("http://"),
        "connect_timeout": timedelta(seconds=1),
        "read_timeout": timedelta(seconds=silence_s),
        # Of a whole request; the largest blob on a slow line must fit.
        "timeout": timedelta(hours=1),
    }
    return S3Store.from_url(url, client_options=options, retry_config=retry)
