"""Churn exactness: adapters stream while they and others are added, replaced and deleted, and the bank holds only some of them.

Every token must be that of one version which the request's name meant between the request and its first token. The server is used as
its users do, over HTTP; what a name may mean is known because every name has one writer at a time.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, fields
from typing import Any

import httpx

from benchmarks.soak.history import History
from benchmarks.soak.references import Adapters
from benchmarks.soak.scrape import Figures, scrape
from benchmarks.soak.streams import Reply, completions, generate

# Longer than two blocks, and the same for more than one: the prefix cache has something to give.
PROMPTS = ("The prefix cache keeps what all of these share: one", "The prefix cache keeps what all of these share: two")
TOKENS = 20
STREAMS = 6
_OTHERS = 6
_AT_ONCE = 4
"""Changes under way at a time."""
_DELETED = 0.2
"""Which part of the changes of a name that exists are deletions."""
_FREED_WITHIN_S = 30.0

Key = tuple[str, str]
"""Tenant and name."""


@dataclass(slots=True)
class ChurnReport:
    """What a churn found. ``mismatches``, ``hangs`` and ``errors`` are to be empty."""

    seconds: float = 0.0
    requests: Counter[str] = field(default_factory=Counter)
    checked_tokens: int = 0
    contents_seen: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    delete_ms: list[float] = field(default_factory=list)
    push_ms: list[float] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    most_resident: int = 0
    evictions: int = 0
    cached_tokens: int = 0
    freed_after_s: float | None = None
    left: dict[str, float] = field(default_factory=dict)
    """What was still taken when waiting for it to be freed ended."""

    @property
    def changes_per_s(self) -> float:
        return sum(self.changes.values()) / self.seconds

    def to_json(self) -> dict[str, Any]:
        return {item.name: getattr(self, item.name) for item in fields(self)} | {"changes_per_s": round(self.changes_per_s, 1)}


class Churn:
    """One run against one server. ``keys``: API keys by tenant."""

    def __init__(
        self, url: str, keys: Mapping[str, str], adapters: Adapters, *, seconds: float, changes_per_s: float, seed: int = 0
    ) -> None:
        self._url = url
        self._keys = keys
        self._adapters = adapters
        self._seconds = seconds
        self._changes_per_s = changes_per_s
        self._random = random.Random(seed)
        tenants = list(keys)
        self._streamed = [(tenants[number % len(tenants)], f"streamed-{number // len(tenants)}") for number in range(STREAMS)]
        others = [(tenants[number % len(tenants)], f"other-{number // len(tenants)}") for number in range(_OTHERS)]
        self._histories = {key: History() for key in (*self._streamed, *others)}
        self._busy: set[Key] = set()
        self._unused = list(adapters.files)
        self._used: list[int] = []
        self._seen: set[int] = set()
        self._https: dict[str, httpx.AsyncClient] = {}
        self.report = ChurnReport()

    async def run(self) -> ChurnReport:
        """Stream and change for the time given, then delete everything and see that it is freed."""
        async with AsyncExitStack() as stack:
            for tenant, secret in self._keys.items():
                http = httpx.AsyncClient(base_url=self._url, headers={"authorization": f"Bearer {secret}"}, timeout=30)
                self._https[tenant] = await stack.enter_async_context(http)
            for key in self._streamed:
                await self._push(key, self._content(key, 0.0))
            before = await self._scrape()
            started = time.monotonic()
            end = started + self._seconds
            async with asyncio.TaskGroup() as group:
                for number, key in enumerate(self._streamed):
                    group.create_task(self._stream(key, number, end))
                group.create_task(self._change(started, end))
                group.create_task(self._watch(end))
            self.report.seconds = time.monotonic() - started
            after = await self._scrape()
            self.report.evictions = int(_grown(before, after, "medley_adapter_evictions_total"))
            self.report.cached_tokens = int(_grown(before, after, "medley_prefix_cache_tokens_total", result="hit"))
            self.report.contents_seen = len(self._seen)
            await self._free()
        return self.report

    async def _stream(self, key: Key, number: int, end: float) -> None:
        """One request after the other on a name, of all kinds in turn."""
        tenant, name = key
        http = self._https[tenant]
        for kind, prompt in self._asks(number):
            if time.monotonic() > end:
                return
            if kind == "generate":
                reply = await generate(http, name, prompt, TOKENS)
            else:
                reply = await completions(http, name, prompt, TOKENS, n=4 if kind == "n=4" else 1)
            self._check(key, kind, prompt, reply)
            if reply.code:
                await asyncio.sleep(0.02)

    def _asks(self, number: int) -> Iterator[tuple[str, str]]:
        kinds = itertools.cycle(("n=1", "n=4", "generate"))
        return zip(itertools.islice(kinds, number, None), itertools.cycle(PROMPTS), strict=False)

    def _check(self, key: Key, kind: str, prompt: str, reply: Reply) -> None:
        possible = self._histories[key].possible(reply.started, reply.answered)
        where = f"{'/'.join(key)}, {kind}, {reply.answered - reply.started:.2f} s to the first token"
        if reply.code == "hang":
            self.report.hangs.append(where)
        elif reply.code == "adapter_not_found" and None in possible:
            self.report.requests["not found"] += 1
        elif reply.code:
            self.report.errors.append(f"{where}: {reply.code}")
        else:
            self.report.requests[kind] += 1
            self.report.checked_tokens += sum(len(choice.labels) for choice in reply.choices)
            for content in possible:
                if content is None:
                    continue
                reference = self._adapters.says[content, prompt]
                if all(reference.matches(choice) for choice in reply.choices):
                    self._seen.add(content)
                    return
            self.report.mismatches.append(f"{where}: {[choice.labels for choice in reply.choices]}")

    async def _change(self, started: float, end: float) -> None:
        """Changes at the rate asked for; late ones follow at once, a few at a time."""
        room = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                due = started + number / self._changes_per_s
                if due > end:
                    return
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await room.acquire()
                if time.monotonic() > end:
                    return
                key = self._random.choice([key for key in self._histories if key not in self._busy])
                self._busy.add(key)
                task = group.create_task(self._change_one(key, (time.monotonic() - started) / self._seconds))
                task.add_done_callback(lambda _: room.release())

    async def _change_one(self, key: Key, progress: float) -> None:
        try:
            if self._histories[key].newest is not None and self._random.random() < _DELETED:
                await self._delete(key)
                self.report.changes["deleted"] += 1
            else:
                content = self._content(key, progress)
                is_new = content not in self._used
                is_added = self._histories[key].newest is None
                await self._push(key, content)
                self.report.changes[f"{'added' if is_added else 'replaced'}, {'new' if is_new else 'known'} bytes"] += 1
        finally:
            self._busy.discard(key)

    def _content(self, key: Key, progress: float) -> int:
        """Other bytes than the name has: new ones spread over the whole run, known ones in between."""
        wanted = STREAMS + progress * (len(self._adapters.files) - STREAMS)
        if self._unused and len(self._used) < wanted:
            return self._unused[0]
        return self._random.choice([content for content in self._used if content != self._histories[key].newest])

    async def _push(self, key: Key, content: int) -> None:
        if content in self._unused:
            self._unused.remove(content)
        form = [("files", (file, data)) for file, data in self._adapters.files[content].items()]
        seconds = await self._send(key, content, "POST", f"/v1/adapters?name={key[1]}", 201, form)
        self.report.push_ms.append(seconds * 1000)
        if content not in self._used:
            self._used.append(content)

    async def _delete(self, key: Key) -> None:
        seconds = await self._send(key, None, "DELETE", f"/v1/adapters/{key[1]}", 200)
        self.report.delete_ms.append(seconds * 1000)

    async def _send(self, key: Key, content: int | None, method: str, path: str, expected: int, form: Any = None) -> float:
        """Make a change. Seconds that it took."""
        history = self._histories[key]
        sent = time.monotonic()
        history.begin(content, sent)
        try:
            reply = await self._https[key[0]].request(method, path, files=form)
        except httpx.TransportError as error:
            self.report.hangs.append(f"{method} {path}: {type(error).__name__}")
            return time.monotonic() - sent
        if reply.status_code == expected:
            history.finish(time.monotonic())
        else:
            self.report.errors.append(f"{method} {path}: {reply.status_code} {reply.text[:200]}")
        return time.monotonic() - sent

    async def _watch(self, end: float) -> None:
        """How many adapters the bank holds at most."""
        while time.monotonic() < end:
            figures = await self._scrape()
            held = sum(figures.value("medley_adapter_slots", state=state) for state in ("used", "pinned"))
            self.report.most_resident = max(self.report.most_resident, int(held))
            await asyncio.sleep(0.25)

    async def _free(self) -> None:
        """Delete all names that are left; then nothing may stay on the device."""
        for key, history in self._histories.items():
            if history.newest is not None:
                await self._delete(key)
        started = time.monotonic()
        while time.monotonic() - started < _FREED_WITHIN_S:
            figures = await self._scrape()
            self.report.left = {name: taken for name, taken in _taken(figures).items() if taken}
            if not self.report.left:
                self.report.freed_after_s = time.monotonic() - started
                return
            await asyncio.sleep(0.05)

    async def _scrape(self) -> Figures:
        return await scrape(next(iter(self._https.values())))


def _grown(before: Figures, after: Figures, name: str, **labels: str) -> float:
    return after.value(name, **labels) - before.value(name, **labels)


def _taken(figures: Figures) -> dict[str, float]:
    return {
        "device bytes": figures.value("medley_adapter_bytes", tier="device"),
        "slots": figures.value("medley_adapter_slots", state="used") + figures.value("medley_adapter_slots", state="pinned"),
        "running": figures.value("medley_requests_running"),
        "K/V blocks": figures.value("medley_kv_blocks", state="used"),
    }
