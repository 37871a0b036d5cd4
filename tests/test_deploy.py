"""Compose, Prometheus and Grafana files: well-formed, hardened, and consistent with each other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from server.config import TABLE

ROOT = Path(__file__).parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SHARED_FILE = ROOT / "deploy/compose/shared-store.yml"
SHARED: dict[str, Any] = yaml.safe_load(SHARED_FILE.read_text())
SECRETS = ("GRAFANA_PASSWORD", "POSTGRES_PASSWORD", "S3_SECRET_KEY")


def test_compose_is_accepted() -> None:
    """By docker-compose where there is one; its structure is checked everywhere."""
    for name, service in SERVICES.items():
        assert "image" in service or "build" in service, name
        for dependency in service.get("depends_on", {}):
            assert dependency in SERVICES
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), source
    if shutil.which("docker-compose"):
        environment = {**os.environ, "GRAFANA_PASSWORD": "secret"}
        subprocess.run(
            ["docker-compose", "-f", ROOT / "docker-compose.yml", "config", "-q"], check=True, env=environment, cwd=ROOT
        )
        without = {name: value for name, value in os.environ.items() if name != "GRAFANA_PASSWORD"}
        refused = subprocess.run(
            ["docker-compose", "-f", ROOT / "docker-compose.yml", "config", "-q"], env=without, cwd="/", capture_output=True
        )
        assert refused.returncode, "there must be no default password"


def test_what_replicas_share_is_accepted() -> None:
    assert SHARED["services"].keys() == {"server", "prepare", "postgres", "s3"}
    settings = {row.env for row in TABLE}
    for name in SHARED["services"]["server"]["environment"]:
        assert name in settings or name.startswith("AWS_"), name
    if shutil.which("docker-compose"):
        command = ["docker-compose", "-f", ROOT / "docker-compose.yml", "-f", SHARED_FILE, "config", "-q"]
        environment = {**os.environ, **dict.fromkeys(SECRETS, "secret")}
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
        for secret in SECRETS:
            without = {name: value for name, value in environment.items() if name != secret}
            refused = subprocess.run(command, env=without, cwd="/", capture_output=True)
            assert refused.returncode, f"there must be no default for {secret}"


def test_services_are_hardened() -> None:
    more = {name: SHARED["services"][name] for name in ("postgres", "s3")}
    for name, service in {**SERVICES, **more}.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "docker.sock" not in json.dumps(service), name
        if name not in ("keys", "prepare"):
            assert "healthcheck" in service, name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    assert all("ports" not in service for service in (SERVICES["redis"], *more.values()))
    assert "\nUSER 10001\n" in (ROOT / "Dockerfile").read_text()
    assert "HEALTHCHECK" in (ROOT / "Dockerfile").read_text()


def test_example_environment_is_complete() -> None:
    named = {line.split("=")[0] for line in (ROOT / ".env.example").read_text().splitlines() if "=" in line}
    text = (ROOT / "docker-compose.yml").read_text() + SHARED_FILE.read_text()
    used = {part.split(":")[0].split("}")[0] for part in text.split("${")[1:]}
    assert used == named


def test_prometheus_scrapes_the_server_with_a_key() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    job = config["scrape_configs"][0]
    assert job["static_configs"][0]["targets"] == ["server:8000"]
    assert job["authorization"]["credentials_file"].startswith("/keys/")


def test_dashboard() -> None:
    board = json.loads((ROOT / "deploy/grafana/dashboards/overview.json").read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        taken = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        cells |= taken
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"]["uid"] == "${datasource}"
        for target in panel["targets"]:
            assert "$__interval" not in target["expr"]
            assert "rate(" not in target["expr"] or "$__rate_interval" in target["expr"]
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/medley.yml").read_text())
    mounted = [volume.split(":")[1] for volume in SERVICES["grafana"]["volumes"]]
    assert provider["providers"][0]["options"]["path"] in mounted
