"""Adapters change all the time under load: nobody gets another version's token, nothing hangs, everything is freed.

The churn is that of ``make soak`` (benchmarks/soak), for a few seconds.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from benchmarks.soak.churn import PROMPTS, STREAMS, TOKENS, Churn
from benchmarks.soak.history import History
from benchmarks.soak.references import Adapters, make_adapters
from benchmarks.soak.scrape import Figures
from medley_client.flow import read_error
from tests.conftest import TinyModels
from tests.live import Live, live_server, wait_for

SLOTS = 3
WATCHDOG_S = 30.0


@pytest.fixture(scope="module")
def adapters(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return make_adapters(tiny_models("llama"), tmp_path_factory.mktemp("adapters"), range(24), PROMPTS, TOKENS)


@pytest.fixture(scope="module")
def live(tiny_models: TinyModels, adapters: Adapters, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server whose bank holds half as many adapters as are asked for at a time."""
    room = adapters.program_bytes * SLOTS + adapters.program_bytes // 2
    flags = ("--bank-bytes", str(room), "--host-bytes", str(2 * room))
    with live_server(tiny_models("llama"), tmp_path_factory.mktemp("churn"), *flags) as server:
        yield server


def figures(live: Live) -> Figures:
    with live.http() as http:
        return Figures(http.get("/metrics").text)


def taken(found: Figures) -> float:
    """Bytes on the device and rows in use."""
    return found.value("medley_adapter_bytes", tier="device") + found.value("medley_requests_running")


def test_every_token_is_that_of_the_version_asked_for(live: Live, adapters: Adapters) -> None:
    report = asyncio.run(Churn(live.url, live.keys, adapters, seconds=8, changes_per_s=30).run())
    assert (report.mismatches, report.hangs, report.errors) == ([], [], [])
    assert report.freed_after_s is not None, report.left
    # The run was one that could have gone wrong: more adapters than slots, new versions, deletions, shared prefixes, several choices.
    assert 1 < report.most_resident <= SLOTS < STREAMS
    assert min(report.evictions, report.cached_tokens, report.contents_seen - STREAMS, report.changes["deleted"]) > 0
    assert min(report.requests[kind] for kind in ("n=1", "n=4", "generate")) > 0
    assert sum(report.changes.values()) > 40


def test_another_versions_tokens_would_be_noticed(adapters: Adapters) -> None:
    said = {content: adapters.says[content, PROMPTS[0]] for content in adapters.files}
    assert len({tuple(reference.ids) for reference in said.values()}) == len(said)


def test_a_change_takes_effect_between_its_request_and_its_reply() -> None:
    history = History()
    history.begin(1, sent=10)
    history.finish(replied=11)
    history.begin(2, sent=20)
    assert history.possible(0, 5) == {None}
    assert history.possible(5, 10.5) == {None, 1}
    assert history.possible(12, 19) == {1}
    assert history.possible(12, 99) == {1, 2}
    history.finish(replied=21)
    history.begin(None, sent=30)
    history.finish(replied=31)
    assert history.possible(22, 29) == {2}
    assert history.possible(32, 99) == {None}


Arguments = dict[str, Any]
"""How httpx is told what to send."""


@dataclass(frozen=True)
class Operation:
    """A row of the table: what is sent, how often in comparison, and the outcomes that are right: a status, or an error's code."""

    name: str
    weight: int
    method: str
    path: str
    outcomes: frozenset[str]
    arguments: Callable[[random.Random, str, Adapters], Arguments] = lambda *_: {}
    tokens_read: int | None = None
    """Of a stream: how many events to read before leaving."""


def generate(rng: random.Random, name: str, _: Adapters) -> Arguments:
    parameters = {"adapter_id": name, "max_new_tokens": rng.choice((1, 8, 40)), "ignore_eos_token": True}
    return {"json": {"inputs": rng.choice(PROMPTS), "parameters": parameters}}


def complete(rng: random.Random, name: str, _: Adapters) -> Arguments:
    return {"json": {"model": name, "prompt": rng.choice(PROMPTS), "max_tokens": 8, "n": rng.choice((1, 4)), "temperature": 0}}


def upload(rng: random.Random, _: str, adapters: Adapters) -> Arguments:
    files = adapters.files[rng.choice(list(adapters.files))]
    return {"files": [("files", (file, data)) for file, data in files.items()]}


ONE = "/v1/adapters/{name}"
FOUND = frozenset({"200", "adapter_not_found"})
OPERATIONS = (
    Operation("generate", 4, "POST", "/generate", FOUND, generate),
    Operation("complete", 4, "POST", "/v1/completions", FOUND, complete),
    Operation("leave", 2, "POST", "/generate_stream", FOUND, generate, tokens_read=2),
    Operation("replace", 5, "POST", "/v1/adapters?name={name}", frozenset({"201"}), upload),
    Operation("show", 1, "GET", ONE, FOUND),
    Operation("delete", 3, "DELETE", ONE, FOUND),
    Operation("load", 2, "POST", f"{ONE}/load", frozenset({"202", "adapter_not_found"})),
    Operation("pin", 2, "POST", f"{ONE}/pin", frozenset({"200", "adapter_not_found", "pin_limit"})),
    Operation("unpin", 2, "DELETE", f"{ONE}/pin", FOUND),
)
NAMES = ("a", "b", "c", "d", "e")


def perform(operation: Operation, http: httpx.Client, rng: random.Random, adapters: Adapters) -> str:
    """What came of an operation, ``hang`` if nothing did."""
    name = rng.choice(NAMES)
    arguments = operation.arguments(rng, name, adapters)
    try:
        with http.stream(operation.method, operation.path.format(name=name), **arguments) as response:
            if operation.tokens_read is None or response.is_error:
                response.read()
            else:
                for _ in zip(range(operation.tokens_read), response.iter_lines(), strict=False):
                    pass
    except httpx.TimeoutException:
        return "hang"
    if response.is_error:
        return read_error(response.status_code, response.text, response.headers).code
    return str(response.status_code)


def test_interleavings_of_all_operations_do_not_hang(live: Live, adapters: Adapters) -> None:
    weights = [operation.weight for operation in OPERATIONS]

    def work(seed: int) -> list[tuple[str, str]]:
        rng = random.Random(seed)
        wrong = []
        with live.http() as http:
            http.timeout = httpx.Timeout(WATCHDOG_S)
            for operation in rng.choices(OPERATIONS, weights, k=125):
                outcome = perform(operation, http, rng, adapters)
                if outcome not in operation.outcomes:
                    wrong.append((operation.name, outcome))
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert [item for wrong in pool.map(work, range(4)) for item in wrong] == []
    with live.http() as http:
        for name in NAMES:
            http.delete(f"/v1/adapters/{name}")
    wait_for(lambda: not taken(figures(live)))
    assert figures(live).value("medley_engine_restarts_total") == 0
