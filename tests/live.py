"""Live servers for tests: real processes, on tiny models, on free loopback ports."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil

from examples.serving import running_server
from medley_client import Medley
from server.api.auth import new_key
from tests.kernels import KERNELS

TENANTS = ("acme", "globex")
OPERATOR = "operator"
SHARERS = 8
"""Test modules and packages that may have tenants of their own on one server."""
SMALL = ("--dtype", "float32", "--kv-cache-bytes", "32MiB", "--bank-bytes", "64MiB", "--host-bytes", "64MiB", "--threads", "1")


@dataclass(frozen=True)
class Live:
    """A running server and the keys of those who use it: of the tenants by the names in ``TENANTS``, and the operator's."""

    url: str
    keys: dict[str, str]
    data_dir: Path
    names: dict[str, str]
    """What the server calls them."""

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

    def process(self) -> psutil.Process:
        """The server's own process, which serves HTTP."""
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if "server" in line and str(self.data_dir) in line:
                return process
        raise LookupError("the server does not run")

    def child(self, module: str) -> psutil.Process:
        """The server's child process that runs a module."""
        for process in self.process().children():
            with suppress(psutil.NoSuchProcess):
                if module in process.cmdline():
                    return process
        raise LookupError(f"no {module} process of this server runs")


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Until it holds. What happens at all happens at once, so that the time is only what a very busy machine may need."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)


@contextmanager
def live_server(
    model: Path, data_dir: Path, *flags: str, tenants: Sequence[str] = TENANTS, env: dict[str, str] | None = None
) -> Iterator[Live]:
    """A server with keys for every tenant, and an operator's."""
    data_dir.mkdir(parents=True, exist_ok=True)
    if not (data_dir / "kernels").exists():
        (data_dir / "kernels").symlink_to(KERNELS)
    made = {tenant: new_key(tenant) for tenant in tenants} | {OPERATOR: new_key(OPERATOR, is_operator=True)}
    keys_file = data_dir / "keys.txt"
    keys_file.write_text("".join(f"{line}\n" for _, line in made.values()))
    arguments = ("--model", str(model), "--keys-file", str(keys_file), *SMALL, *flags)
    with running_server(data_dir, *arguments, env=env) as url:
        yield Live(url, {tenant: key for tenant, (key, _) in made.items()}, data_dir, {tenant: tenant for tenant in made})


Sharing = Callable[[], Live]
"""Gives whoever calls it the shared server with two tenants whom nobody else is."""


@contextmanager
def shared_server(model: Path, data_dir: Path) -> Iterator[Sharing]:
    """One server for all who need no settings of their own, but names, and for whom it may hold what others left."""
    tenants = [f"{tenant}-{number}" for number in range(SHARERS) for tenant in TENANTS]
    with live_server(model, data_dir, tenants=tenants) as server:
        numbers = itertools.count()

        def share() -> Live:
            number = next(numbers)
            names = {**{tenant: f"{tenant}-{number}" for tenant in TENANTS}, OPERATOR: OPERATOR}
            return replace(server, keys={tenant: server.keys[name] for tenant, name in names.items()}, names=names)

        yield share
