"""What a driver and the benchmark say to each other: one JSON object a line. Standard library only: every peer's environment has it.

The first line is a Setup, then come jobs, one at a time; the end of the input ends the driver. Whatever libraries print goes to the log.
"""

from __future__ import annotations

import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.work import Job


@dataclass(frozen=True, slots=True)
class Setup:
    """``base`` is a prepared base directory, ``dtype`` its precision, ``adapters`` the directories that jobs name, ``cache`` a directory for
    conversions, which stay, and ``options`` the engine's own."""

    base: str
    base_digest: str
    dtype: str
    adapters: list[str]
    cache: str
    options: dict[str, Any] = field(default_factory=dict)


class Engine(ABC):
    """An engine with its base loaded and its adapters at hand."""

    @abstractmethod
    def run(self, job: Job) -> float:
        """Answer all requests of a job, all at once. Returns seconds from the first prompt to the last token; raises what goes wrong."""

    def close(self) -> None:  # noqa: B027
        """Free what outlives the process."""


def drive(make: Callable[[Setup], Engine]) -> None:
    """Be a driver: read a setup and jobs from standard input until it ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        engine = make(Setup(**json.loads(sys.stdin.readline())))
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is the reason why it is not measured
        reply(error=f"{type(error).__name__}: {error}")
        return
    reply(ready=True)
    try:
        for line in sys.stdin:
            try:
                reply(seconds=engine.run(Job(**json.loads(line))))
            except Exception as error:  # noqa: BLE001
                reply(error=f"{type(error).__name__}: {error}")
    finally:
        engine.close()


def encoded(message: Setup | Job) -> str:
    """A message as its line."""
    return json.dumps(asdict(message)) + "\n"
