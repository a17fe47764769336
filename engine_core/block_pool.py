"""KV blocks: reference counts, the prefix cache, and which block to reuse next.

A block is *in use* while its reference count is above zero. A free block may still be *cached*: its content is known
by a hash and a later prompt may take it back. Free blocks are reused in the order in which they became free (least
recently used first), so cached content lives as long as memory allows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """All blocks of the KV cache. Block ids are 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that nothing uses, cached or not."""
        return len(self._free)

    def lookup(self, block_hash: bytes) -> int | None:
        """The block with this content, if there is one."""
        return self._cached.get(block_hash)

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks nothing uses at the moment."""
        return sum(self._ref_counts[block_id] == 0 for block_id in block_ids)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Adds a user to cached blocks."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """Takes blocks to be written; what was cached in them is forgotten. There must be enough free ones."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        taken = []
        for _ in range(count):
            block_id, _ = self._free.popitem(last=False)
            assert self._ref_counts[block_id] == 0
            if self._hashes[block_id] is not None:
                self.forget(block_id)
            self._ref_counts[block_id] = 1
            taken.append(block_id)
        return taken

    def release(self, block_ids: Sequence[int]) -> None:
        """Takes a user from a request's blocks, given in the order of the sequence.

        The end of a sequence is reused first: its beginning is what other prompts share.
        """
        for block_id in reversed(block_ids):
            count = self._ref_counts[block_id] - 1
            assert count >= 0, f"block {block_id} released too often"
            self._ref_counts[block_id] = count
            if count == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def publish(self, block_id: int, block_hash: bytes) -> None:
        """Makes a full block findable. Of several blocks with one content the first stays the one that is found."""
        if block_hash not in self._cached:
            assert self._hashes[block_id] is None
            self._cached[block_hash] = block_id
            self._hashes[block_id] = block_hash

    def forget(self, block_id: int) -> None:
        """Takes a block out of the prefix cache; who uses it goes on using it."""
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._cached[block_hash]
            self._hashes[block_id] = None

    def forget_all(self) -> None:
        """Empties the prefix cache."""
        self._cached.clear()
        self._hashes = [None] * self.num_blocks

    def check_integrity(self, users: Iterable[Sequence[int]]) -> None:
        """Asserts that counts, free list and prefix cache agree with the block lists of all requests."""
        counts = [0] * self.num_blocks
        for block_ids in users:
            for block_id in block_ids:
                counts[block_id] += 1
        assert counts == self._ref_counts, "reference counts differ from the blocks that requests hold"
        free = {block_id for block_id, count in enumerate(counts) if count == 0}
        assert free == set(self._free), "the free list differs from the blocks that nothing uses"
        for block_hash, block_id in self._cached.items():
            assert self._hashes[block_id] == block_hash, f"block {block_id} is cached under another hash"
        assert sum(block_hash is not None for block_hash in self._hashes) == len(self._cached)
