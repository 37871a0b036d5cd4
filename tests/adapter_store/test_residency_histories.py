"""Random histories of both registries against a model of a few lines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from adapter_store.residency import STATES, TRANSITIONS, IllegalTransition, LeaseExpired, LocalResidency, ResidencyRegistry
from adapter_store.residency_redis import RedisResidency
from tests.redis import running_redis

T = TypeVar("T")
REPLICAS = st.sampled_from(("one", "two", "three"))
PROGRAMS = st.sampled_from(("p", "q", "r"))


class History(RuleBasedStateMachine):
    """``self.model`` is replica → program → state, of replicas with a lease."""

    url: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self.registry: ResidencyRegistry = self.run(self.open())
        self.model: dict[str, dict[str, str]] = {}

    async def open(self) -> ResidencyRegistry:
        if self.url is None:
            return LocalResidency(time.monotonic)
        registry = RedisResidency(self.url, timeout_s=5)
        for replica in await registry.replicas():
            await registry.forget(replica)
        return registry

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(call)

    @rule(replica=REPLICAS)
    def heartbeat(self, replica: str) -> None:
        assert self.run(self.registry.heartbeat(replica, 60)) == (replica in self.model)
        self.model.setdefault(replica, {})

    @rule(replica=REPLICAS, programs=st.dictionaries(PROGRAMS, st.sampled_from(STATES)))
    def enter(self, replica: str, programs: dict[str, str]) -> None:
        self.run(self.registry.enter(replica, 60, programs))
        self.model[replica] = {program: state for program, state in programs.items() if state != "stored"}

    @rule(replica=REPLICAS, program=PROGRAMS, state=st.sampled_from(STATES))
    def publish(self, replica: str, program: str, state: str) -> None:
        entries = self.model.get(replica)
        if entries is None:
            with pytest.raises(LeaseExpired):
                self.run(self.registry.publish(replica, program, state))
            return
        current = entries.get(program, "stored")
        if state != current and state not in TRANSITIONS[current]:
            with pytest.raises(IllegalTransition):
                self.run(self.registry.publish(replica, program, state))
            return
        self.run(self.registry.publish(replica, program, state))
        entries[program] = state
        if state == "stored":
            del entries[program]

    @rule(replica=REPLICAS)
    def lapse(self, replica: str) -> None:
        self.run(self.registry.heartbeat(replica, 0.001))
        time.sleep(0.003)
        self.model.pop(replica, None)

    @rule(replica=REPLICAS)
    def forget(self, replica: str) -> None:
        self.run(self.registry.forget(replica))
        self.model.pop(replica, None)

    @invariant()
    def everybody_sees_the_same(self) -> None:
        assert self.run(self.registry.replicas()) == self.model
        assert self.run(self.registry.leases()).keys() == self.model.keys()
        for program in ("p", "q", "r"):
            expected = {replica: entries[program] for replica, entries in self.model.items() if program in entries}
            assert self.run(self.registry.holders(program)) == expected

    def teardown(self) -> None:
        self.run(self.registry.close())
        self.loop.close()


@pytest.fixture(params=["local", "redis"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str | None]:
    if request.param == "local":
        yield None
        return
    with running_redis(tmp_path_factory.mktemp("valkey")) as (address, _):
        yield address


def test_histories(url: str | None) -> None:
    machine = type("OneHistory", (History,), {"url": url})
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=30))
