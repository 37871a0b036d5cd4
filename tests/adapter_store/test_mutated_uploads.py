"""Two thousand uploads that something went wrong with: what becomes visible is what its own bytes are, and nothing is left behind."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_store.errors import AdapterNotFound, AdapterRejected, DigestMismatch, OffsetMismatch
from adapter_store.manifest import manifest_digest
from adapter_store.store import Store
from tests.adapter_store.test_store import read
from tests.adapter_store.uploads import good

CASES = 2000
ROLES = {"adapter_config.json": "config", "adapter_model.safetensors": "weights"}
Pieces = list[bytes]


def flip(rng: random.Random, pieces: Pieces) -> Pieces:
    content = bytearray(b"".join(pieces))
    for _ in range(rng.randint(1, 8)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return [bytes(content)]


def truncate(rng: random.Random, pieces: Pieces) -> Pieces:
    content = b"".join(pieces)
    return [content[: rng.randrange(len(content))]]


def reorder(rng: random.Random, pieces: Pieces) -> Pieces:
    return rng.sample(pieces, len(pieces))


def lose(rng: random.Random, pieces: Pieces) -> Pieces:
    gone = rng.randrange(len(pieces))
    return pieces[:gone] + pieces[gone + 1 :]


def repeat(rng: random.Random, pieces: Pieces) -> Pieces:
    again = rng.randrange(len(pieces))
    return pieces[: again + 1] + pieces[again:]


MUTATIONS: tuple[Callable[[random.Random, Pieces], Pieces], ...] = (flip, truncate, reorder, lose, repeat)


def pieces_of(content: bytes, size: int) -> Pieces:
    return [content[start : start + size] for start in range(0, len(content), size)]


def as_a_form(store: Store, name: str, sent: dict[str, Pieces], ends_early: bool) -> None:
    with store.begin_upload() as staging:
        for filename, pieces in sent.items():
            with staging.open(filename) as writer:
                for piece in pieces:
                    writer.write(piece)
        if ends_early:
            raise ConnectionError
        store.commit("acme", name, staging.finish(), {})


def as_blobs(store: Store, name: str, sent: dict[str, Pieces], declared: dict[str, str], ends_early: bool) -> None:
    for filename, pieces in sent.items():
        upload = store.begin_blob("acme")
        try:
            offset = 0
            for piece in pieces:
                with store.append_blob("acme", upload, offset) as writer:
                    writer.write(piece)
                offset = writer.offset
            with pytest.raises(OffsetMismatch):
                store.append_blob("acme", upload, offset + 1)
            if ends_early:
                raise ConnectionError
            store.finish_blob("acme", upload, declared[filename])
        except DigestMismatch:
            store.cancel_blob("acme", upload)
            raise
    with store.begin_upload() as staging:
        store.stage_blobs("acme", declared, staging)
        store.commit("acme", name, staging.finish(), {})


def test_mutated_uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a crash of the machine loses is not tested here, and syncing is most of the time.
    monkeypatch.setattr(os, "fsync", lambda _: None)
    rng = random.Random(4)
    ahead = 0.0
    store = Store.open(tmp_path, clock=lambda: time.time() + ahead)
    stored: dict[str, dict[str, bytes]] = {}
    outcomes: Counter[str] = Counter()
    for case in range(CASES):
        name, files = f"bot-{case}", good(case % 5)
        # A whole blob of an earlier case must not hide that this one is broken: what is declared is what was meant.
        declared = {filename: hashlib.sha256(content).hexdigest() for filename, content in files.items()}
        sent = {filename: pieces_of(content, rng.randint(20, 80)) for filename, content in files.items()}
        victim, mutate = rng.choice(list(files)), rng.choice(MUTATIONS)
        sent[victim] = mutate(rng, sent[victim])
        ends_early, in_blobs = rng.random() < 0.1, rng.random() < 0.5
        if in_blobs and rng.random() < 0.3:
            # Broken before the client made its digests, or a client that declares nonsense.
            declared[victim] = rng.choice([hashlib.sha256(b"".join(sent[victim])).hexdigest(), "0" * 64])
        whole = {ROLES[filename]: b"".join(pieces) for filename, pieces in sent.items()}
        honest = all(declared[filename] == hashlib.sha256(b"".join(sent[filename])).hexdigest() for filename in sent)
        try:
            if in_blobs:
                as_blobs(store, name, sent, declared, ends_early)
            else:
                as_a_form(store, name, sent, ends_early)
        except (AdapterRejected, DigestMismatch, ConnectionError) as error:
            outcomes[type(error).__name__] += 1
            if isinstance(error, DigestMismatch):
                assert not honest
            with pytest.raises(AdapterNotFound):
                store.resolve("acme", name)
        else:
            outcomes["stored"] += 1
            assert not ends_early
            assert honest or not in_blobs
            stored[name] = whole
            version = store.resolve("acme", name)
            assert version.digest == manifest_digest(
                {role: hashlib.sha256(content).hexdigest() for role, content in whole.items()}
            )
            assert read(store, version) == whole
        if len(list((tmp_path / "partial").iterdir())) > 20:
            # Connections that ended early leave uploads that may still be gone on with; a day later they go.
            ahead += 25 * 3600
            assert store.sweep().uploads > 20
    assert min(outcomes.values()) > 100, outcomes
    assert len(outcomes) == 4

    ahead += 25 * 3600
    store.sweep()
    wanted = {hashlib.sha256(content).hexdigest() for whole in stored.values() for content in whole.values()}
    left = {path.name for path in tmp_path.rglob("*") if path.is_file() and not path.name.startswith("catalog.sqlite")}
    assert left == wanted
    assert [record.name for record in store.records("acme", CASES)] == sorted(stored)
    for name in rng.sample(sorted(stored), 50):
        assert read(store, store.resolve("acme", name)) == stored[name]
    store.close()
