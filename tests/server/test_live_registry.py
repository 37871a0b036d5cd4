"""Replicas, the registry behind them and the quarantine, as users and operators meet them: real servers on a real Redis."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis import Redis
from safetensors.numpy import load_file, save_file

from examples.serving import running_server
from medley_client import ApiError, Medley
from tests.conftest import TinyModels
from tests.live import OPERATOR, SMALL, Live, live_server, wait_for
from tests.parity.variants import VARIANTS, make_adapter
from tests.redis import start_redis
from tests.seaweed import BUCKET, Seaweed

BLOBS = f"s3://{BUCKET}/registry"


@dataclass
class Cluster:
    """A server and the Redis that it publishes to, which tests may end and start anew."""

    server: Live
    directory: Path
    url: str
    redis: subprocess.Popen[bytes]
    shared: tuple[str, ...]
    """Flags of what replicas have in common."""

    def shown(self) -> dict[str, Any]:
        with self.server.http(OPERATOR) as http:
            shown: dict[str, Any] = http.get("/v1/registry").json()
        return shown

    def published(self) -> dict[str, str] | None:
        """What the registry says of this server: program → state. None: nothing."""
        shown = self.shown()
        return next((item["programs"] for item in shown["replicas"] if item["replica"] == shown["replica"]), None)

    def others(self) -> list[list[str]]:
        """The states of the programs of each other replica."""
        shown = self.shown()
        return [sorted(item["programs"].values()) for item in shown["replicas"] if item["replica"] != shown["replica"]]

    def readiness(self) -> dict[str, Any]:
        with self.server.http() as http:
            ready: dict[str, Any] = http.get("/readyz").json()
        return ready

    def end_redis(self) -> None:
        self.redis.kill()
        self.redis.wait()

    def start_redis(self) -> None:
        self.url, self.redis = start_redis(self.directory)


@pytest.fixture(scope="module")
def model(tiny_models: TinyModels) -> Path:
    return tiny_models("llama")


@pytest.fixture(scope="module")
def adapters(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("adapters")
    return {
        item.name: make_adapter(item, "llama", model, directory / item.name)
        for item in VARIANTS
        if item.name in ("plain", "dora")
    }


@pytest.fixture(scope="module")
def cluster(model: Path, seaweed: Seaweed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    directory = tmp_path_factory.mktemp("cluster")
    url, redis = start_redis(directory)
    made: Cluster | None = None
    try:
        shared = ("--redis-url", url, "--catalog-url", f"sqlite:///{directory / 'catalog.sqlite'}", "--blobs-url", BLOBS)
        with live_server(model, directory / "data", *shared, env=seaweed.environment) as server:
            made = Cluster(server, directory, url, redis, shared)
            yield made
    finally:
        (made.redis if made is not None else redis).kill()


def outcome(client: Medley, name: str) -> str:
    """``served``, or the error's code."""
    try:
        client.generate("Hello", adapter=name, max_new_tokens=2, ignore_eos_token=True)
    except ApiError as error:
        return error.code
    return "served"


def test_operators_see_whose_programs_these_are_and_others_do_not(cluster: Cluster, adapters: dict[str, Path]) -> None:
    server = cluster.server
    with server.client("acme") as acme, server.client("globex") as globex, server.http("acme") as http:
        acme.adapters.push(adapters["plain"], "mine")
        acme.adapters.push(adapters["dora"], "mine")
        globex.adapters.push(adapters["plain"], "ours")
        assert outcome(globex, "ours") == "served"
        both = [{"adapter": "mine@v1", "weight": 0.5}, {"adapter": "mine"}]
        assert http.post("/v1/completions", json={"prompt": "Hello", "adapters": both, "max_tokens": 2}).status_code == 200
        refused = http.get("/v1/registry")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "operator_only")
        wait_for(lambda: list((cluster.published() or {}).values()) == ["resident"] * 2)
        shown = cluster.shown()
        [replica] = shown["replicas"]
        assert 0 < replica["lease_seconds"] <= 10
        single, composite = shown["programs"]
        assert replica["programs"] == {single["program"]: "resident", composite["program"]: "resident"}
        plain = [{"tenant": "acme", "name": "mine", "version": "v1"}, {"tenant": "globex", "name": "ours", "version": "v1"}]
        dora = [{"tenant": "acme", "name": "mine", "version": "v2"}]
        assert [item["names"] for item in single["adapters"]] == [plain]
        assert [item["names"] for item in composite["adapters"]] == [plain, dora]
        assert (single["loads"], single["admissions"], single["failures"], single["evictions"]) == (1, 1, 0, 0)
        assert single["load_seconds"].keys() == {"host", "resident"}
        assert single["bytes"] > 0
        assert single["last_used"] <= time.time()
        wait_for(lambda: cluster.shown()["engine"]["slots"]["used"] == 2)
        engine = cluster.shown()["engine"]
        assert engine["device_bytes"]["total"] >= engine["device_bytes"]["used"] > 0
        assert engine["counters"]["loads"] >= 2
        acme.adapters.delete("mine")
        globex.adapters.delete("ours")
        wait_for(lambda: cluster.published() == {})


def test_what_is_deleted_on_one_replica_leaves_the_others(
    cluster: Cluster, model: Path, seaweed: Seaweed, adapters: dict[str, Path]
) -> None:
    """Two servers share Redis, catalog and blobs."""
    data, second, keys = cluster.server.data_dir, cluster.directory / "second", cluster.server.keys
    flags = ("--model", str(model), "--keys-file", str(data / "keys.txt"), *SMALL, *cluster.shared)
    with cluster.server.client("acme") as acme, cluster.server.client("globex") as globex:
        acme.adapters.push(adapters["plain"], "doomed")
        [file] = (data / "programs").rglob("*.safetensors")
        acme.adapters.push(adapters["dora"], "shared")
        globex.adapters.push(adapters["dora"], "shared")
        # What cannot be read of an earlier process's programs is made again.
        shutil.copytree(data / "programs", second / "programs")
        content, file = file.read_bytes(), second / file.relative_to(data)
        file.write_bytes(content[:100])
        with running_server(second, *flags, env=seaweed.environment) as url:
            with Medley(url, keys["acme"]) as other:
                assert [outcome(other, name) for name in ("doomed", "shared")] == ["served"] * 2
            assert file.read_bytes() == content
            wait_for(lambda: cluster.others() == [["resident", "resident"]])
            acme.adapters.delete("doomed")
            acme.adapters.delete("shared")
            # The other tenant's adapter has the same bytes, and stays.
            wait_for(lambda: cluster.others() == [["resident"]])
            # An announcement that nobody heard is made up for, and nobody waits for it.
            cluster.redis.send_signal(signal.SIGSTOP)
            assert outcome(globex, "shared") == "served"
            globex.adapters.delete("shared")
            time.sleep(1.6)
            cluster.redis.send_signal(signal.SIGCONT)
            wait_for(lambda: cluster.others() == [[]])
        # A server that stops leaves at once, whatever its lease.
        assert cluster.others() == []


def filled(adapter: Path, directory: Path, value: float) -> Path:
    """An adapter with one value for all weights: other bytes, and where the value is large, results that overflow."""
    shutil.copytree(adapter, directory)
    tensors = {name: np.full_like(tensor, value) for name, tensor in load_file(directory / "adapter_model.safetensors").items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def test_an_adapter_that_keeps_failing_is_refused_until_there_is_a_new_version(
    cluster: Cluster, adapters: dict[str, Path], tmp_path: Path
) -> None:
    hot, server = filled(adapters["plain"], tmp_path / "hot", 1e19), cluster.server
    with server.client("acme") as acme, server.client("globex") as globex, server.http("acme") as http:
        for client in (acme, globex):
            client.adapters.push(hot, "hot")
        acme.adapters.push(adapters["plain"], "cool")
        assert [outcome(acme, "hot") for _ in range(5)] == ["non_finite_output"] * 3 + ["adapter_quarantined"] * 2
        refused = http.post("/v1/completions", json={"model": "hot", "prompt": "Hello"})
        assert (refused.status_code, refused.headers["x-should-retry"]) == (409, "false")
        error = refused.json()["error"]
        assert error["param"] == "model"
        assert "hot@v1 failed 3 times in a row" in error["message"]
        assert "POST /v1/adapters/hot@v1/load" in error["message"]
        assert "medley_adapters_quarantined 1.0" in http.get("/metrics").text
        assert outcome(acme, "cool") == "served"
        # Nobody else pays for it: the same bytes are another tenant's business.
        assert outcome(globex, "hot") == "non_finite_output"
        acme.adapters.push(adapters["dora"], "hot")
        assert outcome(acme, "hot") == "served"
        assert outcome(acme, "hot@v1") == "adapter_quarantined"
        for client, name in ((acme, "hot"), (acme, "cool"), (globex, "hot")):
            client.adapters.delete(name)


def test_a_program_that_cannot_be_loaded_is_made_anew(cluster: Cluster, adapters: dict[str, Path], tmp_path: Path) -> None:
    with cluster.server.client() as client:
        client.adapters.push(adapters["dora"], "good")
        [good] = (cluster.server.data_dir / "programs").rglob("*.safetensors")
        client.adapters.push(filled(adapters["plain"], tmp_path / "bad", 0.01), "bad")
        bad = next(path for path in good.parent.glob("*.safetensors") if path != good)
        shutil.copy(good, bad)
        assert [outcome(client, "bad") for _ in range(3)] == ["adapter_load_failed", "served", "served"]
        assert outcome(client, "good") == "served"
        for name in ("good", "bad"):
            client.adapters.delete(name)


def test_losing_redis_fails_nothing_and_it_is_told_everything_when_it_is_back(
    cluster: Cluster, adapters: dict[str, Path]
) -> None:
    cluster.server.push(adapters)
    with cluster.server.client() as client, cluster.server.http() as http:
        assert outcome(client, "plain") == "served"
        wait_for(lambda: list((cluster.published() or {}).values()) == ["resident"])
        stream = client.generate_stream("Hello", adapter="plain", max_new_tokens=400, ignore_eos_token=True)
        next(stream)
        cluster.end_redis()
        assert outcome(client, "dora") == "served"
        assert len(list(stream)) == 399
        wait_for(lambda: cluster.readiness() == {"status": "ok", "degraded": ["registry"]})
        assert 'medley_degraded{dep="registry"} 1.0' in http.get("/metrics").text
        assert outcome(client, "plain") == "served"
        shown = cluster.shown()
        assert (shown["replicas"], shown["degraded"]) == ([], ["registry"])
        assert [item["state"] for item in shown["programs"]] == ["resident"] * 2
        assert list(client.adapters.show("plain").residency.values()) == ["resident"]  # what it holds itself it knows
        cluster.start_redis()
        wait_for(lambda: list((cluster.published() or {}).values()) == ["resident"] * 2)
        wait_for(lambda: cluster.readiness()["degraded"] == [])
        with Redis.from_url(cluster.url) as redis:
            redis.flushall()
        assert outcome(client, "plain") == "served"
        wait_for(lambda: list((cluster.published() or {}).values()) == ["resident"] * 2)
        # An engine that starts anew holds nothing.
        cluster.server.child("server.engine.process").kill()
        wait_for(lambda: cluster.published() == {})
        assert cluster.shown()["programs"] == []
