"""The blocks of one KV cache group: which a request holds, and which it may find.

There is a manager per kind of attention. They differ in what a token still sees, and so in which blocks a request
needs at a time and what makes a cached prefix complete.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from engine_core.block_pool import BlockPool
from engine_core.cache_shape import GroupShape

NEVER = 1 << 62
"""A number of tokens that no request has."""


class BlockTable:
    """A request's blocks in one group, in the order of its tokens. Those at its start may be gone."""

    __slots__ = ("block_ids", "num_blocks", "num_published")

    def __init__(self, first: int = 0, block_ids: Sequence[int] = ()) -> None:
        """Creates the table of a request whose first ``first`` blocks are gone."""
        self.block_ids = list(block_ids)
        """Blocks that are still there."""
        self.num_blocks = first + len(self.block_ids)
        """Blocks from the request's start on, those that are gone included."""
        self.num_published = self.num_blocks
        """Of these, how many have been made findable. At first, those that were found."""

    @property
    def first(self) -> int:
        """Index of the first block that is still there."""
        return self.num_blocks - len(self.block_ids)


class SingleTypeKVCacheManager(ABC):
    """Gives the blocks of a group to requests. The only writer of its pool."""

    def __init__(self, shape: GroupShape, step_tokens: int) -> None:
        self.shape = shape
        self.block_size = shape.block_size
        self.step_tokens = step_tokens
        """See ``max_step_tokens``."""
        self.pool = BlockPool(shape.num_blocks)

    @abstractmethod
    def longest_hit(self, hashes: Sequence[bytes], num_tokens: int, alignment: int) -> int:
        """Length of the longest cached prefix after which the group can go on computing, in tokens.

        Args:
            hashes: Of the request's full blocks.
            num_tokens: Most tokens of the prefix, a multiple of ``alignment``.
            alignment: The result is a multiple of it, as it is of ``block_size``.
        """

    def cached_table(self, hashes: Sequence[bytes], num_tokens: int) -> BlockTable:
        """The blocks of a prefix for which ``longest_hit`` said that they are there. Nobody holds them yet."""
        first = self.shape.first_live_block(num_tokens)
        found = [self.pool.lookup(block_hash) for block_hash in hashes[first : num_tokens // self.block_size]]
        block_ids = [block_id for block_id in found if block_id is not None]
        assert len(block_ids) == len(found)
        return BlockTable(first, block_ids)

    def can_fit(self, cached: BlockTable, num_tokens: int) -> bool:
        """Whether that many tokens fit, through the window if there is one, behind a cached prefix."""
        live = min(
            -(-num_tokens // self.block_size) - cached.first,
            max(self.shape.max_live_blocks(num_tokens, self.step_tokens), len(cached.block_ids)),
        )
        needed = live - len(cached.block_ids)
        return needed <= self.pool.num_free - self.pool.num_free_among(cached.block_ids)

    def grow(self, table: BlockTable, num_tokens: int, slot: int, updates: list[int]) -> int:
        """Adds the blocks that a request lacks for its first ``num_tokens``; there must be enough free ones.

        Args:
            table: The request's.
            num_tokens: Tokens that have to fit.
            slot: The request's.
            updates: Takes slot, index in the table and block of each new one.

        Returns:
            Tokens that fit into all its blocks.
        """
        index = table.num_blocks
        count = -(-num_tokens // self.block_size) - index
        if count > 0:
            new_blocks = self.pool.allocate(count)
            table.block_ids += new_blocks
            for block_id in new_blocks:
                updates += (slot, index, block_id)
                index += 1
            table.num_blocks = index
        return index * self.block_size

    def free_unseen(self, table: BlockTable, num_confirmed: int) -> None:
        """Frees the blocks that no token computed from now on can see.

        Args:
            table: The request's.
            num_confirmed: Tokens before the first one that may still be computed.
        """
        count = self.shape.first_live_block(num_confirmed) - table.first
        if count > 0:
            assert count <= len(table.block_ids), "what is confirmed has blocks"
            self.pool.release(table.block_ids[:count])
            del table.block_ids[:count]

    def publish(self, table: BlockTable, hashes: Sequence[bytes], num_tokens: int) -> None:
        """Makes blocks findable that are full with a request's first ``num_tokens``, as far as it still has them."""
        num_full = num_tokens // self.block_size
        if num_full <= table.num_published:
            return
        block_ids = table.block_ids
        first = table.num_blocks - len(block_ids)
        index = max(table.num_published, first)
        while index < num_full:
            self.pool.publish(block_ids[index - first], hashes[index])
            index += 1
        table.num_published = num_full

    def discard(self, table: BlockTable, hashes: Sequence[bytes]) -> None:
        """Takes a request's blocks out of the prefix cache, those behind the window included."""
        for block_id in table.block_ids:
            self.pool.forget(block_id)
        for block_hash in hashes[: table.first]:
            freed = self.pool.lookup(block_hash)
            if freed is not None:
                self.pool.forget(freed)


class FullAttentionManager(SingleTypeKVCacheManager):
    """A token sees all before it."""

    def longest_hit(self, hashes: Sequence[bytes], num_tokens: int, alignment: int) -> int:
        num_blocks = 0
        for block_hash in hashes[: num_tokens // self.block_size]:
            if self.pool.lookup(block_hash) is None:
                break
            num_blocks += 1
        return num_blocks * self.block_size // alignment * alignment


class SlidingWindowManager(SingleTypeKVCacheManager):
    """A token sees the last ones before it. Blocks behind the window are freed while the request runs."""

    def longest_hit(self, hashes: Sequence[bytes], num_tokens: int, alignment: int) -> int:
        begin = num_tokens // self.block_size
        while num_tokens:
            # Blocks from ``begin`` to the prefix's end are there. What lies before the window need not be. The last
            # one must, even if the next token does not see it: a hit is something that was computed.
            first = min(self.shape.first_live_block(num_tokens), num_tokens // self.block_size - 1)
            while begin > first and self.pool.lookup(hashes[begin - 1]) is not None:
                begin -= 1
            if begin <= first:
                return num_tokens
            num_tokens = (begin - 1) * self.block_size // alignment * alignment
            begin = num_tokens // self.block_size
        return 0


def create_manager(shape: GroupShape, step_tokens: int) -> SingleTypeKVCacheManager:
    """The manager of a group's kind."""
    kind = FullAttentionManager if shape.window is None else SlidingWindowManager
    return kind(shape, step_tokens)
