"""Any history of changes ends, on both databases, as it ends in the model: same results, same errors, same state, same etags."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from adapter_store.errors import StoreError
from adapter_store.manifest import parse_reference
from adapter_store.store import Store
from adapter_store.types import Condition, Target
from tests.adapter_store.catalog_model import Adapter, AliasOf, Model
from tests.adapter_store.staged import staged

names = st.sampled_from("abc")
contents = st.integers(1, 4)
tags = st.sampled_from(["latest", "prod", "canary"])
versions = st.sampled_from(["v1", "v2", "v3", "latest", "prod"])
references = st.one_of(names, st.builds("{}@{}".format, names, versions))
conditions = st.sampled_from(["none", "none", "none", "current", "stale", "absent"])


class Histories(RuleBasedStateMachine):
    """Runs each operation on the store and on the model. Each history has a tenant of its own, and another that must not change."""

    store: Store
    directory: Path
    tenants = itertools.count()

    @initialize()
    def start(self) -> None:
        self.model, self.etags = Model(), {}
        self.tenant = f"tenant-{next(self.tenants)}"

    @rule(name=names, content=contents, tag=tags, condition=conditions)
    def publish(self, name: str, content: int, tag: str, condition: str) -> None:
        self._both(
            name,
            condition,
            lambda match, absent: self.model.publish(name, content, tag, match, absent),
            lambda wanted: (
                self.store.commit(
                    self.tenant, name, staged(self.directory, content), {"content": content}, tag=tag, condition=wanted
                ).number
            ),
        )

    @rule(name=names, tag=tags, version=versions, condition=conditions)
    def set_tag(self, name: str, tag: str, version: str, condition: str) -> None:
        self._both(
            name,
            condition,
            lambda match, absent: self.model.set_tag(name, tag, version, match, absent),
            lambda wanted: self.store.set_tag(self.tenant, name, tag, version, wanted) and None,
        )

    @rule(name=names, tag=tags, condition=conditions)
    def remove_tag(self, name: str, tag: str, condition: str) -> None:
        self._both(
            name,
            condition,
            lambda match, absent: self.model.remove_tag(name, tag, match, absent),
            lambda wanted: self.store.remove_tag(self.tenant, name, tag, wanted) and None,
        )

    @rule(name=names, meant=st.lists(references, min_size=1, max_size=2), condition=conditions)
    def set_alias(self, name: str, meant: list[str], condition: str) -> None:
        self._both(
            name,
            condition,
            lambda match, absent: self.model.set_alias(name, tuple(meant), match, absent),
            lambda wanted: self.store.set_alias(self.tenant, name, [Target(target) for target in meant], wanted) and None,
        )

    @rule(name=names, condition=conditions)
    def remove_alias(self, name: str, condition: str) -> None:
        self._both(
            name,
            condition,
            lambda match, absent: self.model.remove_alias(name, match, absent),
            lambda wanted: self.store.remove_alias(self.tenant, name, wanted),
        )

    @rule(reference=references, condition=conditions)
    def delete(self, reference: str, condition: str) -> None:
        self._both(
            reference.partition("@")[0],
            condition,
            lambda match, absent: self.model.delete(reference, match, absent),
            lambda wanted: {version.number for version in self.store.delete(self.tenant, reference, wanted)},
        )

    @rule(reference=references, user=st.one_of(st.none(), st.text(max_size=3)))
    def resolve(self, reference: str, user: str | None) -> None:
        alias = self.model.names.get(reference)
        targets = alias.targets if isinstance(alias, AliasOf) else (reference,)
        expected = {_outcome(lambda target=target: self._meant(target)) for target in targets}  # type: ignore[misc]
        found = _outcome(lambda: self._found(self.store.resolve(self.tenant, reference, user)))
        assert found in expected

    @invariant()
    def same(self) -> None:
        records = {record.name: record for record in self.store.records(self.tenant)}
        aliases = {alias.name: alias for alias in self.store.aliases(self.tenant)}
        adapters = {name: entry for name, entry in self.model.names.items() if isinstance(entry, Adapter)}
        assert records.keys() == adapters.keys()
        for name, entry in adapters.items():
            assert {version.number: version.facts["content"] for version in records[name].versions} == entry.versions
            assert records[name].tags == entry.tags
        assert {name: tuple(target.reference for target in alias.targets) for name, alias in aliases.items()} == {
            name: entry.targets for name, entry in self.model.names.items() if isinstance(entry, AliasOf)
        }
        for name, entry in self.model.names.items():
            etag = (records.get(name) or aliases[name]).etag
            assert self.etags.setdefault(entry.revision, etag) == etag
        assert len(set(self.etags.values())) == len(self.etags)
        assert self.store.records("nobody") == ()

    def _both(self, name: str, condition: str, model: Callable[..., Any], store: Callable[[Condition], Any]) -> None:
        entry = self.model.names.get(name)
        revision = {"current": entry.revision if entry else -1, "stale": -1}.get(condition)
        match = None if revision is None else self.etags.get(revision, "stale")
        wanted = Condition(match=match, absent=condition == "absent")
        assert _outcome(lambda: store(wanted)) == _outcome(lambda: model(revision, wanted.absent))

    def _meant(self, target: str) -> tuple[str, int]:
        reference = parse_reference(target)
        return reference.name, self.model.number(reference)

    @staticmethod
    def _found(version: Any) -> tuple[str, int]:
        return version.name, version.number


def _outcome(do: Callable[[], Any]) -> Any:
    """What was given back, or the kind of the error."""
    try:
        return do()
    except StoreError as error:
        return type(error)


def test_histories(catalog_url: str, tmp_path: Path) -> None:
    histories = type("HistoriesOfOneStore", (Histories,), {})
    histories.directory = tmp_path
    histories.store = Store.open(tmp_path / "store", catalog_url=catalog_url)
    try:
        run_state_machine_as_test(
            histories,
            settings=settings(max_examples=12, stateful_step_count=25, suppress_health_check=list(HealthCheck)),
        )
    finally:
        histories.store.close()
