"""KV blocks: reference counts, the prefix cache and the order of reuse.

A block is *in use* while its reference count is above zero. A free block may still be *cached*: its content is
registered under a hash, and a later prompt may reuse it. Free blocks are reallocated in the order in which they became
free (least recently used first), so cached content lives as long as memory allows.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence


class BlockPool:
    """All blocks of the KV cache. Block ids are 0 .. num_blocks - 1."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.step_id = 0
        """The last step that may be computing what is published."""
        self._recent: deque[tuple[int, int]] = deque()
        """(step, block): blocks published lately, whose steps may not be done."""

    @property
    def num_free(self) -> int:
        """Number of unused blocks, cached or not."""
        return len(self._free)

    def lookup(self, block_hash: bytes) -> int | None:
        """The block with this content, or None."""
        return self._cached.get(block_hash)

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are currently unused."""
        return sum(self._ref_counts[block_id] == 0 for block_id in block_ids)

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Increments the reference counts of cached blocks."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def allocate(self, count: int) -> list[int]:
        """Allocates blocks for writing and drops their cached content. There must be enough free blocks."""
        assert count <= len(self._free), f"{count} blocks requested, {len(self._free)} free"
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
        """Decrements the reference counts of a request's blocks, given in sequence order.

        The end of a sequence is reused first, since other prompts share its beginning.
        """
        for block_id in reversed(block_ids):
            count = self._ref_counts[block_id] - 1
            assert count >= 0, f"block {block_id} released too often"
            self._ref_counts[block_id] = count
            if count == 0:
                self._free[block_id] = None
                if self._hashes[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def publish(self, block_id: int, block_hash: bytes) -> bool:
        """Adds a full block to the prefix cache, unless another block with the same content is there. Returns whether
        it did."""
        if block_hash in self._cached:
            return False
        assert self._hashes[block_id] is None
        self._cached[block_hash] = block_id
        self._hashes[block_id] = block_hash
        self._recent.append((self.step_id, block_id))
        return True

    def confirm(self, step_id: int) -> None:
        """Records that steps up to this one are done on all ranks."""
        recent = self._recent
        while recent and recent[0][0] <= step_id:
            recent.popleft()

    def published_since(self, step_id: int) -> set[int]:
        """The blocks that were published while this step or later ones may have been computing them."""
        return {block_id for step, block_id in self._recent if step >= step_id}

    def forget_since(self, step_id: int) -> None:
        """Removes these blocks from the prefix cache."""
        for block_id in self.published_since(step_id):
            self.forget(block_id)
        self._recent.clear()

    def forget(self, block_id: int) -> None:
        """Removes a block from the prefix cache; its users keep it."""
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            del self._cached[block_hash]
            self._hashes[block_id] = None

    def drop(self, block_hash: bytes) -> None:
        """Removes a block from the prefix cache, if it is there, and reuses it first."""
        block_id = self._cached.get(block_hash)
        if block_id is not None:
            self.forget(block_id)
            if self._ref_counts[block_id] == 0:
                self._free.move_to_end(block_id, last=False)

    def forget_all(self) -> None:
        """Empties the prefix cache."""
        self._recent.clear()
        self._cached.clear()
        self._hashes = [None] * self.num_blocks

    def check_integrity(self, users: Iterable[Sequence[int]]) -> None:
        """Asserts that counts, free list and prefix cache agree with the block lists of all requests."""
        counts = [0] * self.num_blocks
        for block_ids in users:
            for block_id in block_ids:
                counts[block_id] += 1
        assert counts == self._ref_counts, "reference counts differ from the requests' blocks"
        free = {block_id for block_id, count in enumerate(counts) if count == 0}
        assert free == set(self._free), "the free list differs from the unused blocks"
        for block_hash, block_id in self._cached.items():
            assert self._hashes[block_id] == block_hash, f"block {block_id} is cached under another hash"
        assert sum(block_hash is not None for block_hash in self._hashes) == len(self._cached)
