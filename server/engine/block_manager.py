"""Blocks of the paged K/V cache: who holds which, which may be shared, which is reused next. Standard library only.

A block holds ``block_size`` tokens. Block 0 is the null block: always zero, never handed out; block tables are padded with
it. A full block whose content is known carries a hash that chains over everything before it, so that equal hashes mean
equal K/V. Freed blocks keep their hash until they are reused, oldest first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0


def root_hash(tenant: str, program_id: str) -> bytes:
    """Where a hash chain starts: caches are shared within one tenant and one program, never across."""
    return hashlib.sha256(f"medley-kv\n{len(tenant)}\n{tenant}\n{program_id}".encode()).digest()


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The hash of a full block that follows ``parent`` and holds ``token_ids``."""
    return hashlib.sha256(parent + b"".join(token.to_bytes(4, "little") for token in token_ids)).digest()


def switch_hash(parent: bytes, program_id: str, start: int) -> bytes:
    """Mixes in a program that starts to act at position ``start``, for the block that holds this position."""
    return hashlib.sha256(parent + f"{program_id}\n{start}".encode()).digest()


class BlockManager:
    """Reference-counted blocks with a hash index. All operations are O(blocks touched)."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        if num_blocks < 2 or block_size < 1:
            raise ValueError(f"need at least 2 blocks (one is the null block) of 1 token, got {num_blocks} x {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._refs = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can hand out now, cached ones included."""
        return len(self._free)

    @property
    def num_usable(self) -> int:
        return self.num_blocks - 1

    @property
    def num_used(self) -> int:
        return self.num_usable - len(self._free)

    @property
    def num_cached(self) -> int:
        """Free blocks whose content can still be shared."""
        return sum(1 for block in self._free if self._hashes[block] is not None)

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest known prefix of ``hashes``. Takes no reference: call ``share`` before anything else."""
        if not self._prefix_caching:
            return []
        blocks = []
        for digest in hashes:
            block = self._by_hash.get(digest)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_among(self, blocks: Iterable[int]) -> int:
        return sum(1 for block in blocks if self._refs[block] == 0)

    def share(self, blocks: Iterable[int]) -> None:
        """Take a reference on blocks that ``match`` returned."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """``count`` blocks with unspecified content and one reference each, or None when there are not enough."""
        if count > len(self._free):
            return None
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            self._forget(block)
            self._refs[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give references back. The end of a sequence is reused before its beginning, which is likelier to be shared."""
        for block in reversed(blocks):
            if self._refs[block] <= 0:
                raise ValueError(f"block {block} is released but nobody holds it")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)

    def register(self, block: int, digest: bytes) -> None:
        """Say what a held, full block contains. The first block with some content keeps the index entry."""
        if self._prefix_caching and self._hashes[block] is None and digest not in self._by_hash:
            self._hashes[block] = digest
            self._by_hash[digest] = block

    def check_integrity(self) -> None:
        """Raise if the invariants are broken. For tests and idle moments."""
        for block in range(1, self.num_blocks):
            if (self._refs[block] == 0) != (block in self._free):
                raise RuntimeError(f"block {block} has {self._refs[block]} references and free={block in self._free}")
        if NULL_BLOCK in self._free or self._refs[NULL_BLOCK]:
            raise RuntimeError("the null block was handed out")
        if any(self._hashes[block] != digest for digest, block in self._by_hash.items()):
            raise RuntimeError("the hash index names a block that does not carry the hash")

    def _forget(self, block: int) -> None:
        digest = self._hashes[block]
        if digest is not None:
            del self._by_hash[digest]
            self._hashes[block] = None
