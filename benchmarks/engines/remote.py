"""An engine's driver as the benchmark sees it: a child process in the engine's environment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

from benchmarks.engines.protocol import Setup, encoded
from benchmarks.work import Job

_START_TIMEOUT_S = 600.0
_LAST_WORDS = 600
ROOT = Path(__file__).parents[2]


class EngineFailed(Exception):
    """The engine cannot be had or did not answer; the message is the reason."""


class Remote:
    """Starts a driver and hands it jobs. ``module`` is its name in this package, ``python`` the interpreter of its environment."""

    def __init__(self, module: str, python: Path, log: Path) -> None:
        self._module = module
        self._python = python
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def start(self, setup: Setup) -> None:
        """Load the engine. Raises EngineFailed."""
        if not self._python.exists():
            raise EngineFailed(f"{self._python} is not there: `make bench-peers` makes it")
        self._log.parent.mkdir(parents=True, exist_ok=True)
        paths = (str(ROOT), str(ROOT / "clients/python"), *filter(None, [os.environ.get("PYTHONPATH")]))
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(self._python), "-m", f"benchmarks.engines.{self._module}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
                start_new_session=True,
            )
        self._ask(encoded(setup), _START_TIMEOUT_S)

    def run(self, job: Job, timeout_s: float) -> float:
        """Seconds that the job took. Raises EngineFailed."""
        return float(self._ask(encoded(job), timeout_s)["seconds"])

    def close(self) -> None:
        """End the driver and everything that it started."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(30)
        except (OSError, subprocess.TimeoutExpired):
            pass
        self._kill()
        self._process.wait()
        self._process = None

    def _ask(self, line: str, timeout_s: float) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise EngineFailed("the engine is not running")
        timer = threading.Timer(timeout_s, self._kill)
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if late:
            raise EngineFailed(f"no answer within {timeout_s:.0f} s")
        if not answer:
            raise EngineFailed(f"the driver ended: {self._log.read_text(errors='replace')[-_LAST_WORDS:].strip()}")
        found: dict[str, Any] = json.loads(answer)
        if "error" in found:
            raise EngineFailed(found["error"])
        return found

    def _kill(self) -> None:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # it has ended with all of its children
