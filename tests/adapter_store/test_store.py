"""The store: versions, references, tenants apart, concurrency, and what a crash leaves behind."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from adapter_store.errors import AdapterNotFound, AdapterRejected, BlobCorrupt, InvalidName
from adapter_store.store import AdapterVersion, Store, Swept
from tests.adapter_store.uploads import good, weights


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store")


def push(store: Store, tenant: str, name: str, seed: int = 0) -> AdapterVersion:
    with store.begin_upload() as staging:
        for filename, content in good(seed).items():
            with staging.open(filename) as writer:  # type: ignore[union-attr]
                writer.write(content)
        return store.commit(tenant, name, staging.finish(), {"rank": 2})


def read(store: Store, version: AdapterVersion) -> dict[str, bytes]:
    with store.checkout(version) as paths:
        return {role: path.read_bytes() for role, path in paths.items()}


def contents(seed: int) -> dict[str, bytes]:
    files = good(seed)
    return {"config": files["adapter_config.json"], "weights": files["adapter_model.safetensors"]}


def test_versions_and_references(store: Store) -> None:
    first, second = push(store, "acme", "bot", 1), push(store, "acme", "bot", 2)
    assert (first.number, second.number) == (1, 2)
    assert store.resolve("acme", "bot") == second
    assert store.resolve("acme", "bot@v1") == first
    assert store.resolve("acme", f"bot@{first.digest[:20]}") == first
    assert [version.number for version in store.get("acme", "bot").versions] == [2, 1]
    assert read(store, second) == contents(2)


def test_the_same_bytes_are_the_same_version(store: Store) -> None:
    first, second = push(store, "acme", "bot", 1), push(store, "acme", "bot", 2)
    again = push(store, "acme", "bot", 1)
    assert again == first
    assert store.resolve("acme", "bot") == first  # a re-push is a roll-back
    assert push(store, "acme", "bot", 2) == second


def test_tenants_do_not_see_each_other(store: Store) -> None:
    version = push(store, "acme", "bot")
    messages = set()
    for reference in ("bot", "bot@v1", f"bot@{version.digest}"):
        with pytest.raises(AdapterNotFound) as mine:
            store.resolve("other", reference)
        messages.add(str(mine.value))
    assert len(messages) == 1
    assert store.records("other") == ()
    with pytest.raises(AdapterNotFound):
        store.delete("other", "bot")
    assert store.resolve("acme", "bot") == version


def test_delete_removes_a_version_or_all(store: Store) -> None:
    first, _ = push(store, "acme", "bot", 1), push(store, "acme", "bot", 2)
    assert [gone.number for gone in store.delete("acme", "bot@v2")] == [2]
    assert store.resolve("acme", "bot") == first
    store.delete("acme", "bot")
    with pytest.raises(AdapterNotFound):
        store.resolve("acme", "bot")
    assert push(store, "acme", "bot", 3).number == 1


def test_a_sweep_removes_what_nobody_has_needed_for_an_hour(tmp_path: Path) -> None:
    now = time.time()
    store = Store.open(tmp_path, clock=lambda: now)
    gone = push(store, "acme", "bot", 1)
    kept = push(store, "acme", "kept", 2)
    store.delete("acme", "bot")
    unfinished = store.begin_upload()
    unfinished.open("adapter_config.json").write(b"{")
    assert store.sweep() == Swept(0, 0, 0)
    now += 3601
    assert store.sweep() == Swept(1, 0, 1)  # the config is the other's too
    assert read(store, kept) == contents(2)
    with pytest.raises(BlobCorrupt):
        read(store, gone)
    assert list((tmp_path / "uploads").iterdir()) == []


def test_a_number_is_never_used_again(store: Store) -> None:
    push(store, "acme", "bot", 1)
    push(store, "acme", "bot", 2)
    store.delete("acme", "bot@v2")
    assert push(store, "acme", "bot", 3).number == 3


@pytest.mark.parametrize("name", ["", "Base", "base", "-x", "a" * 65, "a/b", "../x", "a@b", "ä", "a\0", "a b", ".x"])
def test_bad_names_are_refused(store: Store, name: str) -> None:
    with pytest.raises(InvalidName):
        push(store, "acme", name)


@pytest.mark.parametrize(
    "reference", ["bot@", "bot@v0", "bot@sha256:12", "bot@sha256:" + "g" * 64, "bot@v01", "bot@Tag", "bot@v1@v2"]
)
def test_bad_references_are_refused(store: Store, reference: str) -> None:
    with pytest.raises(InvalidName):
        store.resolve("acme", reference)


def test_pages(store: Store) -> None:
    for index in range(5):
        push(store, "acme", f"bot-{index}", index)
    first = store.records("acme", limit=3)
    assert [record.name for record in first] == ["bot-0", "bot-1", "bot-2"]
    assert [record.name for record in store.records("acme", limit=3, after="bot-2")] == ["bot-3", "bot-4"]


def test_many_pushes_at_once_lose_nothing(store: Store) -> None:
    with ThreadPoolExecutor(16) as pool:
        different = list(pool.map(lambda seed: push(store, "acme", "bot", seed), range(16)))
        same = list(pool.map(lambda _: push(store, "acme", "twin"), range(16)))
    assert sorted(version.number for version in different) == list(range(1, 17))
    assert {version.number for version in same} == {1}
    assert len(store.get("acme", "bot").versions) == 16


def test_reopening_keeps_everything(tmp_path: Path) -> None:
    store = Store.open(tmp_path)
    version = push(store, "acme", "bot")
    store.close()
    again = Store.open(tmp_path)
    assert again.resolve("acme", "bot") == version
    assert read(again, version) == contents(0)


def push_fusion(store: Store, tenant: str, name: str, children: str) -> AdapterVersion:
    files = {
        "adapter_fusion_config.json": f'{{"name": "{children}"}}'.encode(),
        "model_adapter_fusion.safetensors": weights(9),
    }
    with store.begin_upload() as staging:
        for filename, content in files.items():
            with staging.open(filename) as writer:
                writer.write(content)
        return store.commit(tenant, name, store.with_children(tenant, staging.finish()), {})


def test_a_fusion_holds_its_children(store: Store) -> None:
    child = push(store, "acme", "a", 1)
    push(store, "acme", "b", 2)
    fusion = push_fusion(store, "acme", "both", "a,b")
    assert fusion.blobs["child/a/weights"] == child.blobs["weights"]
    assert set(fusion.blobs) == {
        "config",
        "weights",
        *(f"child/{name}/{role}" for name in "ab" for role in ("config", "weights")),
    }
    store.delete("acme", "a")
    store.delete("acme", "b")
    store.sweep()
    assert read(store, fusion)["child/a/weights"] == weights(1)
    push(store, "acme", "a", 3)
    push(store, "acme", "b", 2)
    assert push_fusion(store, "acme", "both", "a,b").digest != fusion.digest


def test_a_fusion_finds_children_of_its_own_tenant_only(store: Store) -> None:
    push(store, "acme", "a", 1)
    push(store, "other", "b", 2)
    with pytest.raises(AdapterRejected) as caught:
        push_fusion(store, "acme", "both", "a,b,../c,base")
    assert [(fault.code, fault.found) for fault in caught.value.faults] == [
        ("missing_child", "b"),
        ("missing_child", "../c"),
        ("missing_child", "base"),
    ]
