"""What the commands print with: the two consoles, text made safe for a terminal, sizes, times, JSON and progress."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from medley_client.client import Medley
from medley_client.files import Progress

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def client(arguments: Namespace) -> Medley:
    """A client of the server that the command line names."""
    return Medley(arguments.url, arguments.api_key)


@contextmanager
def progress(arguments: Namespace, name: str) -> Iterator[Progress]:
    """A bar for every kind of work with ``name``, unless a program reads what is printed."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar(*columns, console=err, disable=arguments.json or not err.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(f"{what} {name}", total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield report


def print_json(value: Any) -> int:
    """For programs. Returns the exit status."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")
    return 0


def printable(text: str) -> str:
    """What files and models say must not steer the terminal."""
    return "".join(char if char in "\n\t" or ord(char) >= 160 or 32 <= ord(char) < 127 else "\ufffd" for char in text)


def some(names: Sequence[str], limit: int = 12) -> str:
    """The first names of a list, and how many there are."""
    more = f", … ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"


def ago(moment: float | None) -> str:
    """How long ago something was, in seconds since the epoch."""
    if moment is None:
        return "never"
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("s", 60.0), ("min", 60.0), ("h", 24.0)):
        if seconds < length:
            return f"{seconds:.0f} {unit} ago"
        seconds /= length
    return f"{seconds:.0f} days ago"
