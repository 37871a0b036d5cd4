"""Blocks: never handed out twice, never lost, shared only by equal content."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from server.engine.block_manager import NULL_BLOCK, BlockManager, chain_hash, root_hash

NUM_BLOCKS = 12


class BlockMachine(RuleBasedStateMachine):
    """Holders take, share, register and release blocks in any order."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(NUM_BLOCKS, 4)
        self.references = [0] * NUM_BLOCKS
        self.content: dict[int, bytes] = {}

    @rule(target=held, count=st.integers(0, 5))
    def allocate(self, count: int) -> list[int]:
        free = self.blocks.num_free
        taken = self.blocks.allocate(count)
        if count > free:
            assert taken is None
            return []
        assert taken is not None
        assert len(set(taken)) == count
        assert NULL_BLOCK not in taken
        for block in taken:
            assert self.references[block] == 0
            self.references[block] = 1
            self.content.pop(block, None)
        return taken

    @rule(target=held, digest=st.sampled_from([b"a", b"b", b"c"]))
    def share(self, digest: bytes) -> list[int]:
        found = self.blocks.match([digest])
        for block in found:
            assert self.content[block] == digest
            self.references[block] += 1
        self.blocks.share(found)
        return found

    @rule(holding=held, digest=st.sampled_from([b"a", b"b", b"c"]))
    def register(self, holding: list[int], digest: bytes) -> None:
        if holding and self.references[holding[0]] and holding[0] not in self.content:
            self.blocks.register(holding[0], digest)
            if self.blocks.match([digest]) == [holding[0]]:
                self.content[holding[0]] = digest

    @rule(holding=consumes(held))
    def release(self, holding: list[int]) -> None:
        self.blocks.release(holding)
        for block in holding:
            self.references[block] -= 1

    @invariant()
    def accounts_balance(self) -> None:
        self.blocks.check_integrity()
        assert self.blocks.num_used == sum(1 for count in self.references if count)
        assert self.blocks.num_free + self.blocks.num_used == NUM_BLOCKS - 1


TestBlockMachine = BlockMachine.TestCase
TestBlockMachine.settings = settings(max_examples=60, stateful_step_count=40)


def test_releasing_what_nobody_holds_is_refused() -> None:
    blocks = BlockManager(4, 4)
    with pytest.raises(ValueError, match="nobody holds"):
        blocks.release([1])


def test_cached_blocks_are_reused_oldest_first() -> None:
    blocks = BlockManager(4, 2)
    first = blocks.allocate(3)
    assert first is not None
    for block, digest in zip(first, (b"a", b"b", b"c"), strict=True):
        blocks.register(block, digest)
    blocks.release(first)
    assert blocks.num_cached == 3
    blocks.allocate(1)
    # The end of a sequence goes first: its beginning is likelier to be shared.
    assert [len(blocks.match([digest])) for digest in (b"a", b"b", b"c")] == [1, 1, 0]


def test_hashes_depend_on_tenant_program_and_everything_before() -> None:
    chains = {
        chain_hash(chain_hash(root_hash(tenant, program), first), second)
        for tenant in ("acme", "acm", "e")
        for program in ("p", "base")
        for first in ([1, 2], [2, 1])
        for second in ([3, 4], [3, 5])
    }
    assert len(chains) == 3 * 2 * 2 * 2
    assert root_hash("a", "b\nc") != root_hash("a\nb", "c")
