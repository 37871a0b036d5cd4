"""One conformance suite for the catalog on SQLite and on a real PostgreSQL server."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from adapter_store.aliases import choose
from adapter_store.errors import (
    AdapterNotFound,
    BlobCorrupt,
    IdempotencyKeyReused,
    InvalidAlias,
    InvalidName,
    NameTaken,
    PinLimit,
    PreconditionFailed,
    StoreError,
    StoreUnavailable,
    VersionInUse,
)
from adapter_store.pins import MAX_PINS
from adapter_store.store import Store
from adapter_store.types import AdapterVersion, Alias, Condition, Listed, Replay, Target
from tests.adapter_store.staged import staged

THREADS = 32
Push = Callable[..., AdapterVersion]


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_store(catalog_url: str, tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Opens the same store as often as it is called."""
    opened: list[Store] = []

    def open_it(**options: Any) -> Store:
        opened.append(Store.open(tmp_path / "store", catalog_url=catalog_url, **options))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., Store], clock: Clock) -> Store:
    return open_store(clock=clock)


@pytest.fixture
def push(store: Store, tmp_path: Path) -> Push:
    """``push(tenant, name, content)``, and what else ``commit`` or ``commit_once`` takes."""

    def do(tenant: str, name: str, content: int, **options: Any) -> AdapterVersion | Replay:
        commit = store.commit_once if "idempotency_key" in options else store.commit
        return commit(tenant, name, staged(tmp_path, content), {"content": content}, **options)

    return do


def at_once(do: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """What each of so many threads got, when all start together: a result, or the StoreError."""
    barrier = threading.Barrier(count)

    def run(index: int) -> Any:
        barrier.wait()
        try:
            return do(index)
        except StoreError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


def kinds(results: list[Any]) -> Counter[str]:
    return Counter(type(result).__name__ for result in results)


def is_whole(store: Store, version: AdapterVersion) -> bool:
    with store.checkout(version) as paths:
        return {role: path.stat().st_size for role, path in paths.items()} == {file.role: file.nbytes for file in version.files}


# Versions and tags


def test_a_version_keeps_what_was_uploaded(store: Store, push: Push, clock: Clock) -> None:
    version = push("acme", "bot", 7)
    assert (version.tenant, version.name, version.number) == ("acme", "bot", 1)
    assert (version.created, version.nbytes, version.facts, version.last_used) == (clock.now, 3, {"content": 7}, None)
    assert [(file.role, file.name, file.nbytes) for file in version.files] == [
        ("config", "adapter_config.json", 2),
        ("weights", "adapter_model.safetensors", 1),
    ]
    assert store.resolve("acme", "bot") == store.get("acme", "bot").latest == store.records("acme")[0].latest == version
    assert version.blobs == {file.role: file.sha256 for file in version.files}


def test_a_push_moves_one_tag(store: Store, push: Push) -> None:
    push("acme", "bot", 1, tag="canary")
    assert store.get("acme", "bot").tags == {"latest": 1, "canary": 1}  # a name always means something
    push("acme", "bot", 2)
    push("acme", "bot", 3, tag="canary")
    record = store.get("acme", "bot")
    assert record.tags == {"latest": 2, "canary": 3}
    assert (record.tags_of(3), record.tags_of(1), record.latest.number) == (("canary",), (), 2)
    assert [version.number for version in record.versions] == [3, 2, 1]
    assert [store.resolve("acme", f"bot@{tag}").number for tag in ("latest", "canary", "v1")] == [2, 3, 1]


def test_tags_move_and_go(store: Store, push: Push) -> None:
    for content in (1, 2):
        push("acme", "bot", content)
    assert store.set_tag("acme", "bot", "prod", "v1").tags == {"latest": 2, "prod": 1}
    assert store.set_tag("acme", "bot", "latest", "prod").latest.number == 1  # a rollback
    digest = store.resolve("acme", "bot@v2").digest
    assert store.set_tag("acme", "bot", "prod", digest[:19]).tags == {"latest": 1, "prod": 2}
    assert store.remove_tag("acme", "bot", "prod").tags == {"latest": 1}
    with pytest.raises(AdapterNotFound):
        store.remove_tag("acme", "bot", "prod")
    with pytest.raises(InvalidName, match="latest"):
        store.remove_tag("acme", "bot", "latest")
    with pytest.raises(AdapterNotFound):
        store.set_tag("acme", "bot", "prod", "v3")
    with pytest.raises(AdapterNotFound):
        store.set_tag("acme", "other", "prod", "v1")


def test_bad_tags_are_refused(store: Store, push: Push) -> None:
    push("acme", "bot", 1)
    for tag in ("", "v1", "v01", "Prod", "1st", "a" * 65, "a/b", "a@b", "sha256:" + "a" * 12, "a\0"):
        for do in (
            lambda: push("acme", "bot", 2, tag=tag),  # noqa: B023
            lambda: store.set_tag("acme", "bot", tag, "v1"),  # noqa: B023
            lambda: store.remove_tag("acme", "bot", tag),  # noqa: B023
        ):
            with pytest.raises(InvalidName):
                do()


def test_a_used_version_is_not_deleted(store: Store, push: Push) -> None:
    for content in (1, 2, 3):
        push("acme", "bot", content)
    store.set_tag("acme", "bot", "prod", "v1")
    store.set_alias("acme", "support", [Target("bot@v2", 1)])
    with pytest.raises(VersionInUse, match="prod"):
        store.delete("acme", "bot@v1")
    with pytest.raises(VersionInUse, match="support"):
        store.delete("acme", "bot@v2")
    with pytest.raises(VersionInUse, match="support"):
        store.delete("acme", "bot")
    assert [version.number for version in store.delete("acme", "bot@v3")] == [3]  # latest moves on
    assert store.get("acme", "bot").tags == {"latest": 2, "prod": 1}
    store.remove_alias("acme", "support")
    assert [version.number for version in store.delete("acme", "bot")] == [2, 1]
    with pytest.raises(AdapterNotFound):
        store.get("acme", "bot")


def test_a_delete_does_not_load_what_it_removes(store: Store, push: Push) -> None:
    """Files and facts of a thousand versions would be read while everybody else who writes waits."""
    for content in range(3):
        push("acme", "bot", content)
    statements: list[str] = []
    event.listen(store._database._engine, "before_cursor_execute", lambda *call: statements.append(call[2]))
    gone = store.delete("acme", "bot@v2") + store.delete("acme", "bot")
    assert [version.number for version in gone] == [2, 3, 1]
    read = [statement for statement in statements if statement.startswith("SELECT") and "facts" in statement]
    assert len(read) <= 2  # of one version: the one that is meant, and the latest
    assert not any("FROM files" in statement for statement in statements)


def test_the_last_version_goes_with_its_name(store: Store, push: Push) -> None:
    push("acme", "bot", 1)
    store.set_alias("acme", "support", [Target("bot")])
    with pytest.raises(VersionInUse, match="support"):
        store.delete("acme", "bot@v1")
    store.remove_alias("acme", "support")
    store.delete("acme", "bot@latest")
    assert store.records("acme") == ()


def test_pages_follow_the_bytes_of_names(store: Store, push: Push) -> None:
    names = ["a", "a-b", "a.b", "a_b", "a0", "aa", "b", "10", "9"]
    for content, name in enumerate(names):
        push("acme", name, content)
    store.set_alias("acme", "a1", [Target("a")])
    store.set_tag("acme", "a", "prod", "v1")
    assert store.listed("acme", 100) == tuple(
        Listed(name, None if name == "a1" else store.get("acme", name).latest.created) for name in sorted([*names, "a1"])
    )
    assert [(item.name, item.is_alias) for item in store.listed("acme", 2, "a0")] == [("a1", True), ("a_b", False)]
    assert store.listed("other") == ()
    found: list[str] = []
    while page := store.records("acme", 2, found[-1] if found else ""):
        found += [record.name for record in page]
    assert found == sorted(names)
    for page_of in (store.records, store.listed):
        with pytest.raises(InvalidName):
            page_of("acme", 2, "a\0")


# Conditions


def test_an_etag_changes_with_every_change(store: Store, push: Push) -> None:
    push("acme", "bot", 1)
    seen = [store.get("acme", "bot").etag]
    for change in (
        lambda: push("acme", "bot", 2),
        lambda: store.set_tag("acme", "bot", "prod", "v1"),
        lambda: store.remove_tag("acme", "bot", "prod"),
        lambda: store.delete("acme", "bot@v1"),
        lambda: (store.delete("acme", "bot"), push("acme", "bot", 2)),
    ):
        change()
        seen.append(store.get("acme", "bot").etag)
    assert len(set(seen)) == len(seen)
    push("acme", "bot", 2)
    store.set_tag("acme", "bot", "latest", "v1")
    store.touch({("acme", "bot", 1): store.get("acme", "bot").latest.created + 1})
    assert store.get("acme", "bot").etag == seen[-1]  # nothing has changed


def test_changes_with_a_condition(store: Store, push: Push) -> None:
    push("acme", "bot", 1)
    old = store.get("acme", "bot").etag
    push("acme", "bot", 2, condition=Condition(match=old))
    alias = store.set_alias("acme", "support", [Target("bot")], Condition(absent=True))
    stale, absent = Condition(match=old), Condition(absent=True)
    for condition in (stale, absent):
        for do in (
            lambda: push("acme", "bot", 3, condition=condition),  # noqa: B023
            lambda: store.delete("acme", "bot", condition),  # noqa: B023
            lambda: store.remove_tag("acme", "bot", "prod", condition),  # noqa: B023
            lambda: store.set_tag("acme", "bot", "latest", "v1", condition),  # noqa: B023
            lambda: store.set_alias("acme", "support", [Target("bot@v1")], condition),  # noqa: B023
            lambda: store.remove_alias("acme", "support", condition),  # noqa: B023
        ):
            with pytest.raises(PreconditionFailed):
                do()
    assert store.alias("acme", "support") == alias
    assert store.get("acme", "bot").tags == {"latest": 2}
    store.set_tag("acme", "bot", "prod", "v1", absent)  # of the tag
    for do in (lambda: push("acme", "new", 1, condition=stale), lambda: store.set_alias("acme", "new", [Target("bot")], stale)):
        with pytest.raises(PreconditionFailed):
            do()
    with pytest.raises(AdapterNotFound):
        store.get("acme", "new")
    store.remove_alias("acme", "support", Condition(match=alias.etag))
    store.delete("acme", "bot", Condition(match="*"))


def test_of_many_changes_with_one_etag_one_is_made(store: Store, push: Push) -> None:
    fresh = at_once(lambda index: push("acme", "bot", index, condition=Condition(absent=True)))
    assert kinds(fresh) == {"AdapterVersion": 1, "PreconditionFailed": THREADS - 1}
    etag = store.get("acme", "bot").etag
    changed = at_once(lambda index: push("acme", "bot", 100 + index, condition=Condition(match=etag)))
    assert kinds(changed) == {"AdapterVersion": 1, "PreconditionFailed": THREADS - 1}
    assert len(store.get("acme", "bot").versions) == 2


# Aliases


def test_an_alias_means_its_targets(store: Store, push: Push) -> None:
    first, second = push("acme", "bot", 1), push("acme", "bot", 2)
    targets = (Target("bot@v1", 90.0), Target("bot", 10.0))
    alias = store.set_alias("acme", "support", targets)
    assert alias == Alias("acme", "support", targets, alias.etag) == store.alias("acme", "support")
    assert store.aliases("acme") == (alias,)
    assert store.aliases("acme", after="support") == ()
    assert {store.resolve("acme", "support").number for _ in range(200)} == {1, 2}
    mine = store.resolve("acme", "support", "user-1")
    assert all(store.resolve("acme", "support", "user-1") == mine for _ in range(5))
    moved = store.set_alias("acme", "support", [Target("bot", 1)])
    assert (moved.etag != alias.etag, store.resolve("acme", "support", "user-1")) == (True, second)
    store.set_tag("acme", "bot", "latest", "v1")
    assert store.resolve("acme", "support") == first
    with pytest.raises(AdapterNotFound):
        store.resolve("acme", "support@v1")
    store.remove_alias("acme", "support")
    for do in (lambda: store.alias("acme", "support"), lambda: store.resolve("acme", "support")):
        with pytest.raises(AdapterNotFound):
            do()


def test_a_name_means_one_thing(store: Store, push: Push) -> None:
    push("acme", "bot", 1)
    store.set_alias("acme", "support", [Target("bot")])
    with pytest.raises(NameTaken, match="an alias"):
        push("acme", "support", 1)
    with pytest.raises(NameTaken, match="an adapter"):
        store.set_alias("acme", "bot", [Target("bot")])
    assert store.version("acme", "bot") == store.version("acme", "bot@v1") == store.resolve("acme", "support")
    for do in (
        lambda: store.get("acme", "support"),
        lambda: store.delete("acme", "support"),
        lambda: store.version("acme", "support"),
        lambda: store.version("acme", "bot@v2"),
    ):
        with pytest.raises(AdapterNotFound):
            do()
    for also in (lambda: store.alias("acme", "bot"), lambda: store.remove_alias("acme", "bot")):
        with pytest.raises(AdapterNotFound):
            also()
    assert [record.name for record in store.records("acme")] == ["bot"]


BAD_TARGETS: list[tuple[list[Target], type[StoreError]]] = [
    ([], InvalidAlias),
    ([Target("bot", 0)], InvalidAlias),
    ([Target("bot", -1)], InvalidAlias),
    ([Target("bot", float("nan"))], InvalidAlias),
    ([Target("bot", float("inf"))], InvalidAlias),
    ([Target("bot"), Target("bot", 3)], InvalidAlias),
    ([Target(f"bot@v{number}") for number in range(1, 18)], InvalidAlias),
    ([Target("support")], InvalidAlias),
    ([Target("new")], InvalidAlias),
    ([Target("nobody")], AdapterNotFound),
    ([Target("bot@v2")], AdapterNotFound),
    ([Target("bot@v0")], InvalidName),
]


def test_bad_aliases_are_refused(store: Store, push: Push) -> None:
    push("acme", "bot", 1)
    store.set_alias("acme", "support", [Target("bot")])
    for targets, error in BAD_TARGETS:
        with pytest.raises(error):
            store.set_alias("acme", "new", targets)
    assert [alias.name for alias in store.aliases("acme")] == ["support"]


def test_an_alias_keeps_its_tags(store: Store, push: Push) -> None:
    push("acme", "bot", 1, tag="prod")
    store.set_alias("acme", "support", [Target("bot@prod")])
    with pytest.raises(VersionInUse, match="support"):
        store.remove_tag("acme", "bot", "prod")


def test_no_race_leaves_an_alias_of_nothing(store: Store, push: Push) -> None:
    for round_ in range(10):
        push("acme", "bot", 1)
        push("acme", "bot", 2)
        results = at_once(
            lambda index: (
                store.delete("acme", "bot@v1")
                if index % 2
                else store.set_alias("acme", f"alias-{round_}-{index}", [Target("bot@v1")])  # noqa: B023
            ),
            8,
        )
        assert kinds(results).keys() <= {"list", "Alias", "AdapterNotFound", "VersionInUse"}
        for alias in store.aliases("acme"):
            assert store.resolve("acme", alias.name).number == 1
            store.remove_alias("acme", alias.name)
        store.delete("acme", "bot")


def test_an_alias_and_an_adapter_race_for_a_name(store: Store, push: Push) -> None:
    push("acme", "bot", 1)
    results = at_once(lambda index: push("acme", "x", 2) if index % 2 else store.set_alias("acme", "x", [Target("bot")]))
    assert kinds(results) in (
        {"AdapterVersion": THREADS // 2, "NameTaken": THREADS // 2},
        {"Alias": THREADS // 2, "NameTaken": THREADS // 2},
    )


# Publishing at once, and once


def test_the_same_bytes_at_once_are_one_version(store: Store, push: Push) -> None:
    results = at_once(lambda _: push("acme", "bot", 1))
    assert {version.number for version in results} == {1}
    assert len({version.digest for version in results}) == 1
    assert len(store.get("acme", "bot").versions) == 1


def test_different_bytes_at_once_are_linear_versions(store: Store, push: Push) -> None:
    results = at_once(lambda index: push("acme", "bot", index))
    assert sorted(version.number for version in results) == list(range(1, THREADS + 1))
    record = store.get("acme", "bot")
    assert {version.number: version.digest for version in record.versions} == {
        version.number: version.digest for version in results
    }
    assert record.latest.number == THREADS


def test_a_repeated_publish_changes_nothing(store: Store, push: Push, clock: Clock) -> None:
    push("acme", "bot", 1, idempotency_key="k\0é", reply=lambda version: (201, f"v{version.number}"))
    push("acme", "bot", 2)
    again = push("acme", "bot", 1, idempotency_key="k\0é", reply=lambda _: (500, "never"))
    assert store.resolve("acme", "bot").number == 2
    assert again == store.replay("acme", "k\0é") == Replay(again.fingerprint, 201, "v1")
    store.delete("acme", "bot")
    assert push("acme", "bot", 1, idempotency_key="k\0é", reply=lambda _: (500, "never")) == again
    assert store.records("acme") == ()
    for name, content, options in (("bot", 2, {}), ("other", 1, {}), ("bot", 1, {"tag": "prod"})):
        with pytest.raises(IdempotencyKeyReused):
            push("acme", name, content, idempotency_key="k\0é", reply=lambda _: (201, ""), **options)
    assert (store.replay("acme", "other"), store.replay("other", "k\0é")) == (None, None)
    clock.now += 24 * 3600
    assert store.replay("acme", "k\0é") is None
    push("acme", "new", 3, idempotency_key="k\0é", reply=lambda _: (201, "new"))
    assert store.resolve("acme", "new").number == 1


def test_a_fingerprint_is_of_what_was_sent(store: Store, push: Push, tmp_path: Path) -> None:
    upload = staged(tmp_path, 1)
    push("acme", "bot", 1, idempotency_key="k", reply=lambda _: (201, ""))
    replay = store.replay("acme", "k")
    assert replay is not None
    assert replay.fingerprint == store.fingerprint("bot", upload)
    child = type(upload.files[0])("child/a/weights", "a/x", tmp_path, "0" * 64, 1)
    assert store.fingerprint("bot", upload.with_files([child])) == replay.fingerprint


def test_a_failed_publish_leaves_its_key_free(store: Store, push: Push) -> None:
    def fail(_: AdapterVersion) -> tuple[int, str]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        push("acme", "bot", 1, idempotency_key="k", reply=fail)
    assert store.replay("acme", "k") is None
    assert store.records("acme") == ()
    assert push("acme", "bot", 2, idempotency_key="k", reply=lambda _: (201, "")).number == 1


def test_of_many_publishes_with_one_key_one_is_made(store: Store, push: Push) -> None:
    made: list[int] = []

    def reply(version: AdapterVersion) -> tuple[int, str]:
        made.append(version.number)
        return 201, "made"

    results = at_once(lambda _: push("acme", "bot", 1, idempotency_key="k", reply=reply))
    assert (kinds(results), made) == ({"AdapterVersion": 1, "Replay": THREADS - 1}, [1])
    results = at_once(lambda index: push("acme", "bot", index % 2, idempotency_key="l", reply=reply))
    assert kinds(results) == {"AdapterVersion": 1, "Replay": THREADS // 2 - 1, "IdempotencyKeyReused": THREADS // 2}


# Tenants


def test_tenants_do_not_meet(store: Store, push: Push) -> None:
    mine = push("acme", "bot", 1, idempotency_key="k", reply=lambda _: (201, "acme"))
    theirs = push("other", "bot", 1, idempotency_key="k", reply=lambda _: (201, "other"))
    assert mine.digest == theirs.digest
    push("other", "bot", 2)
    store.set_alias("other", "support", [Target("bot")])
    store.pin("other", theirs.digest)
    assert store.get("acme", "bot").tags == {"latest": 1}
    assert store.aliases("acme") == ()
    assert store.replay("acme", "k") != store.replay("other", "k")
    assert store.absent({mine.digest, "sha256:none"}) == {"sha256:none"}
    store.delete("acme", "bot")
    assert store.absent([mine.digest]) == set()
    assert store.pins() == {("other", mine.digest)}
    messages = set()
    for tenant in ("acme", "nobody"):
        for reference in ("bot", "bot@v1", f"bot@{mine.digest}", "bot@latest"):
            with pytest.raises(AdapterNotFound) as caught:
                store.resolve(tenant, reference)
            messages.add(str(caught.value))
    assert len(messages) == 1
    store.remove_alias("other", "support")
    store.delete("other", "bot")
    assert (store.absent([mine.digest]), store.digests(), store.pins()) == ({mine.digest}, set(), set())


# Blobs


def test_a_blob_is_owned_by_who_uploaded_it(store: Store, push: Push, clock: Clock) -> None:
    records = store._blob_records
    version = push("acme", "bot", 1)
    weights = version.blobs["weights"]
    assert (records.size("acme", weights), records.size("other", weights), records.size("acme", "0" * 64)) == (1, None, None)
    assert records.note(weights, 1) is False
    loose = "1" * 64
    assert records.note(loose, 5) is True
    assert records.size("acme", loose) is None
    records.own("acme", loose)
    records.own("acme", loose)
    assert (records.size("acme", loose), records.size("other", loose)) == (5, None)
    store.delete("acme", "bot")
    assert records.size("acme", weights) is None
    clock.now += 24 * 3600 - 1
    assert records.size("acme", loose) == 5
    assert loose not in records.orphans()
    clock.now += 1
    assert records.size("acme", loose) is None
    assert loose in records.orphans()
    with pytest.raises(StoreUnavailable, match="send it again"):
        records.own("acme", "2" * 64)


def test_a_sweep_removes_what_nobody_needs(store: Store, push: Push, clock: Clock) -> None:
    gone, kept = push("acme", "gone", 1), push("acme", "kept", 2)
    push("acme", "gone", 2)
    store.delete("acme", "gone")
    clock.now += 3599
    assert store.sweep().blobs == 0
    clock.now += 1
    assert store.sweep().blobs == 1
    assert is_whole(store, kept)
    with pytest.raises(BlobCorrupt):
        is_whole(store, gone)
    assert push("acme", "gone", 1).number == 1
    assert is_whole(store, gone)


def test_no_version_loses_a_blob_to_a_sweep(open_store: Callable[..., Store], tmp_path: Path, clock: Clock) -> None:
    """A sweeper whose clock is two hours ahead, so that it wants every blob as soon as no version names it."""
    store, sweeper = open_store(clock=clock), open_store(clock=lambda: clock.now + 7200)
    done = threading.Event()
    swept: list[str] = []

    def sweep() -> None:
        records = sweeper._blob_records
        # Now and then long enough for an upload, on the slowest machine too; mostly too short for one.
        while not done.wait(random.expovariate(1 / 0.02)):
            swept.extend(sha256 for sha256 in records.orphans() if records.remove(sha256, sweeper._blobs.delete))

    def publish(tenant: int) -> None:
        made = 0
        while made < 5 or not swept:
            try:
                version = store.commit(f"t{tenant}", "bot", staged(tmp_path, 1), {})
            except StoreUnavailable:
                continue  # swept in between, and said so
            assert is_whole(store, version)
            store.delete(f"t{tenant}", "bot")
            made += 1

    with ThreadPoolExecutor(6) as pool:
        sweeps = [pool.submit(sweep) for _ in range(2)]
        try:
            list(pool.map(publish, range(4)))
        finally:
            done.set()
        for item in sweeps:
            item.result()


# Use


def test_the_last_use_of_a_version(store: Store, push: Push) -> None:
    made = push("acme", "bot", 1).created
    push("acme", "bot", 2)
    store.touch({("acme", "bot", 1): made + 5, ("acme", "bot", 9): made + 5, ("other", "bot", 1): made + 5})
    store.touch({("acme", "bot", 1): made + 4, ("acme", "bot", 2): made - 1})
    store.touch({})
    assert [version.last_used for version in store.get("acme", "bot").versions] == [None, made + 5]


def test_writing_down_use_never_blocks_deleting(store: Store, push: Push) -> None:
    for _ in range(3):
        for content in range(6):
            push("acme", "bot", content)
        used = {("acme", "bot", number): float(number) for number in range(1, 7)}
        results = at_once(lambda index: store.touch(used) if index else store.delete("acme", "bot"), 8)  # noqa: B023
        assert kinds(results) == {"NoneType": 7, "list": 1}


def test_pins(store: Store, push: Push) -> None:
    versions = [push("acme", f"bot-{content}", content) for content in range(MAX_PINS + 8)]
    results = at_once(lambda index: store.pin("acme", versions[index].digest), len(versions))
    assert kinds(results) == {"bool": MAX_PINS, PinLimit.__name__: 8}
    tenant, digest = sorted(store.pins())[0]
    assert store.pin(tenant, digest) is False  # it is there already
    store.unpin(tenant, digest)
    store.unpin(tenant, digest)
    assert len(store.pins()) == MAX_PINS - 1
    assert store.pin(tenant, digest) is True
    with pytest.raises(AdapterNotFound):
        store.pin("other", digest)
    push("other", "bot", 1)
    for version in versions:
        store.delete("acme", version.name)
    assert store.pins() == set()


def test_a_pin_stays_while_the_tenant_has_the_bytes(store: Store, push: Push) -> None:
    version = push("acme", "bot", 1)
    push("acme", "twin", 1)
    store.pin("acme", version.digest)
    store.delete("acme", "bot")
    assert store.pins() == {("acme", version.digest)}


def test_a_pin_goes_with_the_last_of_twins_that_are_deleted_at_once(store: Store, push: Push) -> None:
    for _ in range(8):
        version = push("acme", "bot", 1)
        push("acme", "twin", 1)
        store.pin("acme", version.digest)
        results = at_once(lambda index: store.delete("acme", ("bot", "twin")[index]), 2)
        assert kinds(results) == {"list": 2}
        assert store.pins() == set()


def test_pinning_beside_deletes_never_fails_for_another_reason_than_that(store: Store, push: Push) -> None:
    for _ in range(8):
        digest = push("acme", "bot", 1).digest
        push("acme", "twin", 1)
        deleting = ("bot", "twin")
        results = at_once(
            lambda index: store.delete("acme", deleting[index]) if index < 2 else store.pin("acme", digest),  # noqa: B023
            6,
        )
        assert kinds(results).keys() <= {"list", "bool", "AdapterNotFound"}
        assert store.pins() == set()


# Transactions


def test_reads_do_not_wait_for_a_write(store: Store, push: Push) -> None:
    before = push("acme", "bot", 1)
    with store._database.write() as connection:
        connection.exec_driver_sql("UPDATE names SET etag = 'unseen'")
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(store.resolve, "acme", "bot").result(timeout=60) == before
            assert pool.submit(store.get, "acme", "bot").result(timeout=60).etag != "unseen"


def test_a_read_sees_one_state(store: Store, push: Push) -> None:
    push("acme", "bot", 1)
    with store._database.read() as connection:
        count = "SELECT count(*) FROM versions"
        assert connection.exec_driver_sql(count).scalar() == 1
        with ThreadPoolExecutor(1) as pool:
            pool.submit(push, "acme", "bot", 2).result(timeout=60)
        assert connection.exec_driver_sql(count).scalar() == 1


# The choice among an alias's targets


def test_users_are_split_by_weight() -> None:
    targets = [Target("bot@v3", 90), Target("bot@v4", 10)]
    chosen = Counter(choose("support", targets, f"user-{number}").reference for number in range(5000))
    assert abs(chosen["bot@v4"] / 5000 - 0.1) <= 0.02
    several = [Target(f"bot@v{number}", number) for number in range(1, 5)]
    chosen = Counter(choose("support", several, f"user-{number}").reference for number in range(5000))
    assert all(abs(chosen[target.reference] / 5000 - target.weight / 10) <= 0.02 for target in several)


def test_a_ramp_moves_only_who_must_move() -> None:
    users = [f"user-{number}" for number in range(2000)]
    before, after = ([Target("old", 100 - share), Target("new", share)] for share in (10, 30))
    moved = [user for user in users if choose("support", before, user).reference != choose("support", after, user).reference]
    assert all(choose("support", after, user).reference == "new" for user in moved)
    assert abs(len(moved) / len(users) - 0.2) <= 0.04


def test_every_process_chooses_alike() -> None:
    targets = [Target("a", 50), Target("b", 50)]
    chosen = [choose("support", targets, f"user-{number}").reference for number in range(12)]
    assert "".join(chosen) == "babbbaaaabaa"
