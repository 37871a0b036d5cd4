"""Who goes first, and who never goes for another."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from server.adapters.eviction import WINDOW_S, Eviction


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Tier:
    """A policy of 100 bytes and its clock."""

    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.policy = Eviction(100, clock=self.clock)

    def add(self, name: str, nbytes: int = 10, tenant: str | None = None, uses: int = 1) -> None:
        self.policy.add(name, nbytes)
        for _ in range(uses if tenant is not None else 0):
            self.policy.use(name, tenant or "")


def test_frequent_ones_stay_and_idle_ones_age() -> None:
    tier = Tier()
    tier.add("often", tenant="t", uses=5)
    tier.add("once", tenant="t")
    assert tier.policy.choose("t", 10, 0) == ["once"]
    # Every eviction raises what a new one starts with, so that fame of long ago fades.
    for number in range(8):
        name = f"new-{number}"
        tier.add(name, tenant="t", uses=3)
        gone = tier.policy.choose("t", 10, 0)
        assert gone is not None
        tier.policy.evict(gone[0])
        if gone == ["often"]:
            break
    else:
        raise AssertionError("what nobody uses any more stayed for ever")


def test_of_equals_the_large_one_goes() -> None:
    tier = Tier()
    for name, nbytes in (("small", 2 << 20), ("large", 20 << 20)):
        tier.add(name, nbytes, "t")
    assert tier.policy.choose("t", 1, 1) == ["large"]


def test_what_is_held_or_permanent_never_goes() -> None:
    tier = Tier()
    for name in "abc":
        tier.add(name)
    tier.policy.keep("a")
    assert tier.policy.permanent_bytes == 10
    assert tier.policy.choose("t", 10, 0, stays="b".__eq__) == ["c"]
    assert tier.policy.choose("t", 20, 0, stays="b".__eq__, shares=False) is None
    assert tier.policy.choose("t", 0, 0) == []


def test_a_share_protects_for_a_while_and_only_so_far() -> None:
    tier = Tier()
    for name in ("b1", "b2"):
        tier.add(name, 20, "b")
    for number in range(6):
        tier.add(f"a{number}", 10, "a", uses=3)
    # 50 bytes each: b is within its share, a is over it, though a's are used more often.
    assert {name[0] for name in tier.policy.choose("a", 60, 0) or ()} == {"a"}
    assert tier.policy.choose("a", 61, 0) is None
    assert set(tier.policy.choose("a", 61, 0, shares=False) or ()) & {"b1", "b2"}
    # A third tenant makes shares of 33 bytes: both give up what is over theirs, and no more.
    assert sorted(name[0] for name in tier.policy.choose("c", 50, 0) or ()) == ["a", "a", "a", "b"]
    assert tier.policy.choose("c", 51, 0) is None
    tier.clock.now += WINDOW_S
    assert tier.policy.choose("a", 100, 0) is not None


def test_a_program_of_two_tenants_is_kept_for_either() -> None:
    tier = Tier()
    tier.add("both", 20, "a")
    tier.policy.use("both", "b")
    for number in range(8):
        tier.add(f"a{number}", 10, "a", uses=5)
    assert "both" not in (tier.policy.choose("a", 80, 0) or ["both"])
    assert tier.policy.choose("a", 81, 0) is None
    tier.clock.now += WINDOW_S / 2
    tier.policy.use("a0", "a")
    tier.clock.now += WINDOW_S / 2
    assert "both" in (tier.policy.choose("a", 100, 0) or ())


def test_what_is_in_use_counts_all_the_time() -> None:
    """For its owner's share and as the share of one who is active, however long ago it began."""
    tier = Tier()
    for name in ("b1", "b2"):
        tier.add(name, 20, "b")
        tier.policy.hold(name, "b")
    tier.clock.now += 10 * WINDOW_S
    tier.add("a", 40, "a")
    assert tier.policy.is_within_share("a", 10)
    assert not tier.policy.is_within_share("a", 11)
    assert not tier.policy.is_within_share("b", 11)
    assert tier.policy.choose("c", 10, 0) == ["a"]
    assert tier.policy.choose("c", 41, 0, drains=True) is not None
    tier.policy.release("b1", "b")
    # It ended just now, and b is over its share with three to share.
    assert tier.policy.choose("c", 60, 0) == ["a", "b1"]
    assert tier.policy.num_staying == 1
    tier.clock.now += WINDOW_S
    assert tier.policy.is_within_share("a", 50)


def test_who_waits_for_room_looks_only_when_something_has_changed() -> None:
    tier, looks = Tier(), Counter[str]()

    def stays(name: str) -> bool:
        looks[name] += 1
        return True

    for number in range(8):
        tier.add(f"b{number}", 10, "b")
    for asking in (*"abcdefgh", None) * 9:
        assert tier.policy.choose(asking, 10, 0, stays=stays) is None
    assert set(looks.values()) == {1}
    tier.policy.use("b0", "b")
    assert tier.policy.choose("a", 10, 0, stays=stays) is None
    tier.policy.recheck()
    assert tier.policy.choose("a", 10, 0, stays=stays) is None
    assert set(looks.values()) == {3}
    tier.policy.recheck()
    tier.clock.now += WINDOW_S
    assert tier.policy.choose("a", 10, 0) is not None


USES = st.lists(st.tuples(st.integers(0, 11), st.sampled_from("abcd"), st.integers(0, 4)), max_size=60)


@settings(max_examples=200)
@given(uses=USES, sizes=st.lists(st.integers(1, 30), min_size=12, max_size=12), asking=st.sampled_from("abcde"))
def test_a_tenant_within_its_share_loses_nothing_to_another(
    uses: list[tuple[int, str, int]], sizes: list[int], asking: str
) -> None:
    """Over any history, and every victim at its turn; and who is within its share with what it asks for gets it."""
    clock = Clock()
    policy = Eviction(100, 8, clock=clock)
    held: dict[str, int] = {}
    recent: dict[tuple[str, str], float] = {}
    active: dict[str, float] = {}

    def usage(tenant: str, names: dict[str, int]) -> tuple[int, int]:
        mine = [size for name, size in names.items() if clock.now - recent.get((name, tenant), 0) < WINDOW_S]
        return sum(mine), len(mine)

    for number, tenant, wait in [*uses, (12, asking, 0)]:
        clock.now += wait
        name, size = f"p{number}", sizes[number % 12]
        if name not in held:
            tenants = {owner for owner, used in active.items() if clock.now - used < WINDOW_S} | {tenant}
            share = 100 // len(tenants), 8 // len(tenants)
            victims = policy.choose(tenant, sum(held.values()) + size - 100, len(held) + 1 - 8)
            own = usage(tenant, held)
            if own[0] + size <= share[0] and own[1] + 1 <= share[1]:
                assert policy.is_within_share(tenant, size)
                assert victims is not None
            if victims is None:
                continue
            left = dict(held)
            for victim in victims:
                for owner in tenants - {tenant}:
                    if clock.now - recent.get((victim, owner), 0) < WINDOW_S:
                        nbytes, count = usage(owner, left)
                        assert nbytes > share[0] or count > share[1], "taken from a tenant within its share"
                del left[victim]
                policy.evict(victim)
            held = left
            held[name] = size
            policy.add(name, size)
        policy.use(name, tenant)
        recent[name, tenant] = active[tenant] = clock.now
        recent = {key: used for key, used in recent.items() if key[0] in held}
        assert len(policy) == len(held) <= 8
        assert sum(held.values()) <= 100
