"""A real PostgreSQL server for tests, from the package that ships its binaries."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil
import psycopg

_FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=200", "listen_addresses=")


@contextmanager
def running_postgres() -> Iterator[str]:
    """A server on a Unix socket: the URL of its first database. Slow disks do not slow it down, as nothing must outlive it."""
    directory = Path(tempfile.mkdtemp(prefix="postgres-"))
    try:
        with _started(directory):
            yield f"postgresql+psycopg://postgres@/postgres?host={directory}"
    finally:
        shutil.rmtree(directory)


@contextmanager
def silent(server: str) -> Iterator[None]:
    """Connections are accepted, but nobody answers."""
    directory = Path(server.partition("host=")[2])
    postmaster = psutil.Process(int((directory / "data/postmaster.pid").read_text().split()[0]))
    processes = [postmaster, *postmaster.children()]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


@contextmanager
def fresh_database(server: str) -> Iterator[str]:
    """An empty database of a server: its URL."""
    name = f"test_{time.monotonic_ns()}"
    address = server.replace("+psycopg", "")
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
        yield server.replace("/postgres?", f"/{name}?")
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")  # type: ignore[arg-type]


@contextmanager
def _started(directory: Path) -> Iterator[None]:
    # Found, not imported: that would make a user and open up directories for it.
    package, user = Path(str(find_spec("pgserver").origin)).parent, None  # type: ignore[union-attr]
    if os.geteuid() == 0:
        user = pwd.getpwnam("nobody")  # PostgreSQL refuses to run as root
        os.chown(directory, user.pw_uid, user.pw_gid)
        if not all(parent.stat().st_mode & stat.S_IXOTH for parent in package.resolve().parents):
            for name in ("pgserver/pginstall", "pgserver.libs"):
                shutil.copytree(package.parent / name, directory / name)
            package = directory / "pgserver"
    binaries = package / "pginstall/bin"
    who = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    data = directory / "data"
    made = [str(binaries / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "utf8", "--no-locale", "-N"]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL, cwd="/", **who)
    settings = [word for setting in _FAST for word in ("-c", setting)]
    command = [str(binaries / "postgres"), "-D", str(data), "-k", str(directory), *settings]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/", **who)
    try:
        _wait_until_ready(directory, process)
        yield
    finally:
        process.send_signal(signal.SIGQUIT)  # at once: nothing of it is needed again
        process.wait()


def _wait_until_ready(directory: Path, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        try:
            psycopg.connect(f"postgresql://postgres@/postgres?host={directory}").close()
        except psycopg.OperationalError:
            assert process.poll() is None, (directory / "log").read_text()
            time.sleep(0.05)
        else:
            return
    raise AssertionError((directory / "log").read_text())
