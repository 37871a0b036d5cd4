"""Live servers for tests: real processes, on tiny models, on free loopback ports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from examples.serving import running_server
from medley_client import Medley
from server.api.auth import new_key

TENANTS = ("acme", "globex")
OPERATOR = "operator"
SMALL = ("--dtype", "float32", "--kv-cache-bytes", "32MiB", "--bank-bytes", "64MiB", "--host-bytes", "64MiB", "--threads", "1")


@dataclass(frozen=True)
class Live:
    """A running server and its tenants' keys."""

    url: str
    keys: dict[str, str]
    data_dir: Path

    def client(self, tenant: str = "acme") -> Medley:
        return Medley(self.url, self.keys[tenant])

    def http(self, tenant: str | None = "acme") -> httpx.Client:
        headers = {} if tenant is None else {"authorization": f"Bearer {self.keys[tenant]}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def push(self, adapters: Mapping[str, Path]) -> None:
        """Push directories by the names that they are to have."""
        with self.client() as client:
            for name, path in adapters.items():
                client.adapters.push(path, name)

    def child(self, module: str) -> psutil.Process:
        """The server's child process that runs a module."""
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if module in line and any(str(self.data_dir) in part for parent in process.parents() for part in _command(parent)):
                return process
        raise LookupError(f"no {module} process of this server runs")


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


@contextmanager
def live_server(
    model: Path, data_dir: Path, *flags: str, tenants: Sequence[str] = TENANTS, env: dict[str, str] | None = None
) -> Iterator[Live]:
    """A server with keys for every tenant, and an operator's."""
    data_dir.mkdir(parents=True, exist_ok=True)
    made = {tenant: new_key(tenant) for tenant in tenants} | {OPERATOR: new_key(OPERATOR, is_operator=True)}
    keys_file = data_dir / "keys.txt"
    keys_file.write_text("".join(f"{line}\n" for _, line in made.values()))
    arguments = ("--model", str(model), "--keys-file", str(keys_file), *SMALL, *flags)
    with running_server(data_dir, *arguments, env=env) as url:
        yield Live(url, {tenant: key for tenant, (key, _) in made.items()}, data_dir)
