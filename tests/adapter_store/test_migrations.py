"""Migrations on both databases: from what the first release made, back again, and many replicas at once."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, inspect, text

from adapter_store import migrations, schema
from adapter_store.database import Database
from adapter_store.errors import BlobCorrupt, StoreError
from adapter_store.manifest import manifest_digest
from adapter_store.store import Store
from adapter_store.types import Target
from tests.adapter_store.staged import staged

FIRST_RELEASE = (
    """CREATE TABLE adapters (
        tenant VARCHAR(128) NOT NULL, name VARCHAR(64) NOT NULL, latest INTEGER NOT NULL, next_number INTEGER NOT NULL,
        PRIMARY KEY (tenant, name)
    )""",
    """CREATE TABLE versions (
        tenant VARCHAR(128) NOT NULL, name VARCHAR(64) NOT NULL, number INTEGER NOT NULL, digest VARCHAR(71) NOT NULL,
        created FLOAT NOT NULL, nbytes INTEGER NOT NULL, blobs TEXT NOT NULL, facts TEXT NOT NULL,
        PRIMARY KEY (tenant, name, number),
        FOREIGN KEY(tenant, name) REFERENCES adapters (tenant, name) ON DELETE CASCADE
    )""",
)
"""Word for word what the code made that knew no migrations."""
ADD_ADAPTER = "INSERT INTO adapters VALUES (:tenant, :name, :latest, :next_number)"
ADD_VERSION = "INSERT INTO versions VALUES (:tenant, :name, :number, :digest, :created, :nbytes, :blobs, :facts)"


def first_release(url: str, directory: Path) -> dict[str, dict[str, str]]:
    """A store of the first release: two adapters of acme, one of two versions, and a fusion; the roles' blobs by name."""
    blobs = {
        "bot": {"config": "a" * 64, "weights": "b" * 64},
        "head": {"config": "a" * 64, "weights": "c" * 64, "head_config": "d" * 64, "head_weights": "e" * 64, "labels": "f" * 64},
        "both": {"config": "1" * 64, "weights": "2" * 64, "child/bot/config": "a" * 64, "child/bot/weights": "b" * 64},
    }
    stored = {sha256 for roles in blobs.values() for sha256 in roles.values()} | {"9" * 64}
    for sha256 in stored:
        place = directory / "blobs/sha256" / sha256[:2] / sha256
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"x" * int(sha256[0], 16))
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in FIRST_RELEASE:
            connection.execute(text(statement))
        for name, roles in blobs.items():
            adapter = {"tenant": "acme", "name": name, "latest": 1, "next_number": 4 if name == "bot" else 2}
            connection.execute(text(ADD_ADAPTER), adapter)
            for number in (1, 3) if name == "bot" else (1,):
                own = {**roles, "weights": "0" * 63 + "3"} if number == 3 else roles
                (directory / "blobs/sha256/00").mkdir(exist_ok=True)
                (directory / "blobs/sha256/00" / ("0" * 63 + "3")).touch()
                version = {"number": number, "digest": manifest_digest(own), "created": 5.0, "nbytes": 7, "facts": '{"rank": 2}'}
                connection.execute(text(ADD_VERSION), {"tenant": "acme", "name": name, "blobs": json.dumps(own), **version})
    engine.dispose()
    return blobs


def tables(url: str) -> dict[str, list[tuple[object, ...]]]:
    """Everything in the first release's tables."""
    engine = create_engine(url)
    with engine.connect() as connection:
        found = {
            "adapters": "SELECT tenant, name, latest, next_number FROM adapters ORDER BY name",
            "versions": "SELECT tenant, name, number, digest, created, nbytes, blobs, facts FROM versions ORDER BY name, number",
        }
        rows = {table: [tuple(row) for row in connection.execute(text(query))] for table, query in found.items()}
    engine.dispose()
    return rows


def test_the_migrations_make_what_the_code_expects(catalog_url: str) -> None:
    database = Database(catalog_url)
    migrations.upgrade(database)
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []
    database.close()
    script = ScriptDirectory(str(Path(migrations.__file__).parent))
    assert script.get_current_head() == migrations.HEAD


def test_a_store_of_the_first_release_that_lost_its_blobs_opens(catalog_url: str, tmp_path: Path) -> None:
    first_release(catalog_url, tmp_path)
    shutil.rmtree(tmp_path / "blobs")
    store = Store.open(tmp_path, catalog_url=catalog_url)
    with pytest.raises(BlobCorrupt, match="missing"), store.checkout(store.resolve("acme", "bot")):
        raise AssertionError("its blobs are gone")
    store.close()


def test_a_store_of_the_first_release_goes_on(catalog_url: str, tmp_path: Path) -> None:
    blobs = first_release(catalog_url, tmp_path)
    now = 1_800_000_000.0
    store = Store.open(tmp_path, catalog_url=catalog_url, clock=lambda: now)
    assert [record.name for record in store.records("acme")] == ["bot", "both", "head"]
    bot = store.get("acme", "bot")
    assert (bot.tags, [version.number for version in bot.versions]) == ({"latest": 1}, [3, 1])
    version = store.resolve("acme", "bot")
    assert (version.blobs, version.created, version.nbytes, version.facts) == (blobs["bot"], 5.0, 7, {"rank": 2})
    assert [(file.name, file.nbytes) for file in version.files] == [
        ("adapter_config.json", 10),
        ("adapter_model.safetensors", 11),
    ]
    assert {file.role: file.name for file in store.resolve("acme", "both").files} == {
        "config": "adapter_fusion_config.json",
        "weights": "model_adapter_fusion.safetensors",
        "child/bot/config": "bot/adapter_config.json",
        "child/bot/weights": "bot/adapter.safetensors",
    }
    assert {file.role: file.name for file in store.resolve("acme", "head").files} == {
        "config": "adapter_config.json",
        "weights": "adapter.safetensors",
        "head_config": "head_config.json",
        "head_weights": "model_head.safetensors",
        "labels": "labels.json",
    }
    assert store.commit("acme", "bot", staged(tmp_path, 5), {}).number == 4
    now += 3600
    assert store.sweep().blobs == 1  # what was an orphan then
    store.close()


def test_the_way_back(catalog_url: str, tmp_path: Path) -> None:
    first_release(catalog_url, tmp_path)
    before = tables(catalog_url)
    store = Store.open(tmp_path, catalog_url=catalog_url)
    assert len({store.get("acme", name).etag for name in ("bot", "both", "head")}) == 3
    store.set_tag("acme", "bot", "prod", "v3")
    store.set_alias("acme", "support", [Target("bot@v3")])
    store.pin("acme", store.resolve("acme", "bot").digest)
    migrations.downgrade(store._database, "0001")
    after = tables(catalog_url)
    assert after["adapters"] == before["adapters"]
    assert [(*row[:6], json.loads(str(row[6])), row[7]) for row in after["versions"]] == [
        (*row[:6], json.loads(str(row[6])), row[7]) for row in before["versions"]
    ]
    migrations.upgrade(store._database)
    assert store.get("acme", "bot").tags == {"latest": 1}
    migrations.downgrade(store._database, "base")
    with store._database.read() as connection:
        assert inspect(connection).get_table_names() == ["alembic_version"]
    store.close()


@pytest.mark.parametrize("old", [False, True])
def test_many_replicas_open_at_once(catalog_url: str, tmp_path: Path, old: bool) -> None:
    if old:
        first_release(catalog_url, tmp_path)
    with ThreadPoolExecutor(8) as pool:
        stores = list(pool.map(lambda _: Store.open(tmp_path, catalog_url=catalog_url), range(8)))
    version = stores[0].commit("acme", "new", staged(tmp_path, 1), {})
    assert all(store.resolve("acme", "new") == version for store in stores)
    for store in stores:
        store.close()


def test_newer_tables_are_refused(catalog_url: str, tmp_path: Path) -> None:
    store = Store.open(tmp_path, catalog_url=catalog_url)
    with store._database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(StoreError, match="9999"):
        Store.open(tmp_path, catalog_url=catalog_url)
    store.close()


def test_only_known_databases_are_opened(tmp_path: Path) -> None:
    for url in ("mysql://localhost/medley", "postgresql://localhost/medley", "nonsense"):
        with pytest.raises(StoreError, match=r"sqlite:///"):
            Store.open(tmp_path, catalog_url=url)
