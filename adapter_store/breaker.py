"""A breaker: a backend that does not answer is left alone for a while, so that callers fail at once and threads do not pile up behind it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from adapter_store.errors import StoreUnavailable


class Breaker:
    """Counts failures in a row. After ``failures`` of them nobody may try for ``rest_s`` seconds, then one caller.

    The rest doubles with every try that fails, up to ``longest_s``. It has a jitter of a half, so that replicas do not try in step.
    """

    def __init__(self, what: str, *, failures: int = 3, rest_s: float = 1.0, longest_s: float = 30.0) -> None:
        self._what = what
        self._failures = failures
        self._first_rest_s = self._rest_s = rest_s
        self._longest_s = longest_s
        self._failed = 0
        self._shut_until = 0.0
        self._lock = threading.Lock()

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """One attempt to reach the backend. StoreUnavailable from within is a failure, everything else an answer.

        Raises StoreUnavailable without an attempt while the breaker is shut.
        """
        self._enter()
        try:
            yield
        except StoreUnavailable:
            self._did_not_answer()
            raise
        except Exception:
            self._answered()
            raise
        self._answered()

    def _enter(self) -> None:
        with self._lock:
            if self._failed < self._failures:
                return
            if time.monotonic() < self._shut_until:
                raise StoreUnavailable(f"{self._what} did not answer just now and is left alone for a moment; try again")
            # This caller tries; the others go on being refused meanwhile.
            self._rest_s = min(self._longest_s, self._rest_s * 2)
            self._shut()

    def _shut(self) -> None:
        self._shut_until = time.monotonic() + self._rest_s * random.uniform(0.5, 1.5)  # noqa: S311 - jitter, not cryptography

    def _did_not_answer(self) -> None:
        with self._lock:
            self._failed += 1
            # Those who were under way when it shut, and fail later, do not make it any longer.
            if self._failed == self._failures:
                self._shut()

    def _answered(self) -> None:
        with self._lock:
            self._failed = 0
            self._rest_s = self._first_rest_s
