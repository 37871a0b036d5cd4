"""A real S3-compatible store for tests: SeaweedFS, from the package that ships its program."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

BUCKET = "medley"
_SERVERS = ("master", "volume", "filer", "s3", "admin")


@dataclass(frozen=True, slots=True)
class Seaweed:
    """A running store. ``environment`` is what its clients need, ``process`` is there to be stopped and continued."""

    environment: dict[str, str]
    process: subprocess.Popen[bytes]

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Connections are accepted, but nobody answers."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextmanager
def running_seaweed(directory: Path) -> Iterator[Seaweed]:
    """A store with one bucket on free loopback ports, which keeps its files in ``directory``."""
    identity = {
        "name": "medley",
        "credentials": [{"accessKey": "access", "secretKey": "secret"}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    config = directory / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    ports = dict(zip([f"{name}.port{kind}" for name in _SERVERS for kind in ("", ".grpc")], _free_ports(), strict=True))
    flags = [f"-{name}={port}" for name, port in ports.items()]
    flags += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={directory}", f"-s3.config={config}", f"-bucket={BUCKET}"]
    flags += ["-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false"]
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "access",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("weed"), "mini", *flags], stdout=output, stderr=output, cwd=directory
        )
    try:
        _wait_until_it_stores(environment, process, log)
        yield Seaweed(environment, process)
    finally:
        # Asked to stop it would first wait half a minute for its own parts.
        process.kill()
        process.wait()
        for port in ports.values():
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink()


def _free_ports() -> list[int]:
    """One for each server's HTTP and one for its gRPC."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2 * len(_SERVERS))]
    try:
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def _wait_until_it_stores(environment: dict[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    store = S3Store(
        BUCKET,
        endpoint=environment["AWS_ENDPOINT_URL"],
        region="us-east-1",
        access_key_id="access",
        secret_access_key="secret",
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    for _ in range(300):
        try:
            obstore.put(store, "ready", b"yes")
        except (BaseError, OSError):
            assert process.poll() is None, log.read_text()[-2000:]
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"the store did not start: {log.read_text()[-2000:]}")
