"""Manages the blocks of one KV cache group: those that requests hold, and the prefix cache.

There is one manager per kind of attention. They differ in what a token attends to, and so in the blocks that a request
needs at a time and in what makes a cached prefix complete.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from engine_core.block_pool import BlockPool
from engine_core.cache_shape import GroupShape

NEVER = 1 << 62
"""A token count that no request reaches."""


class BlockTable:
    """A request's blocks in one group, in token order. Leading blocks may have been freed."""

    __slots__ = ("block_ids", "ends", "num_blocks", "num_cached", "num_published", "temporary")

    def __init__(self, first: int = 0, block_ids: Sequence[int] = ()) -> None:
        """Creates the table of a request whose first ``first`` blocks are freed."""
        self.block_ids = list(block_ids)
        """The remaining blocks."""
        self.num_blocks = first + len(self.block_ids)
        """Number of blocks from the request's start, freed ones included."""
        self.num_published = self.num_blocks
        """How many of these are in the prefix cache. Initially the cached prefix."""
        self.num_cached = self.num_blocks
        """Blocks of the cached prefix, which others may hold."""
        self.ends = 0, 0
        """Where its prompt ends, and the tokens with which it started; of states, the snapshots before that."""
        self.temporary: bytes | None = None
        """Hash of the state that was published last, if the next one makes it superfluous."""

    @property
    def first(self) -> int:
        """Index of the first remaining block."""
        return self.num_blocks - len(self.block_ids)


class SingleTypeKVCacheManager(ABC):
    """Assigns the blocks of a group to requests. The only writer of its pool."""

    def __init__(self, shape: GroupShape, step_tokens: int) -> None:
        self.shape = shape
        self.block_size = shape.block_size
        self.step_tokens = step_tokens
        """See ``max_step_tokens``."""
        self.pool = BlockPool(shape.num_blocks)

    @abstractmethod
    def longest_hit(
        self, hashes: Sequence[bytes], num_tokens: int, alignment: int, has: Callable[[bytes], bool]
    ) -> int:
        """Length in tokens of the longest cached prefix after which the group can continue computing.

        Args:
            hashes: Hashes of the request's full blocks.
            num_tokens: Maximum length of the prefix, a multiple of ``alignment``.
            alignment: A multiple of ``block_size``; the result is a multiple of it.
            has: Whether a block is cached.
        """

    def cached_table(self, hashes: Sequence[bytes], num_tokens: int) -> BlockTable:
        """The blocks of a prefix confirmed by ``longest_hit``. They are not held yet."""
        first = self.shape.first_live_block(num_tokens)
        found = [self.pool.lookup(block_hash) for block_hash in hashes[first : num_tokens // self.block_size]]
        block_ids = [block_id for block_id in found if block_id is not None]
        assert len(block_ids) == len(found)
        return BlockTable(first, block_ids)

    def reserve(self, hashes: Sequence[bytes], num_tokens: int) -> tuple[BlockTable, list[int]]:
        """Acquires the cached blocks of a prefix, and allocates others in place of those that are missing.

        Returns:
            The prefix's blocks, and the new ones among them, in order.
        """
        first = self.shape.first_live_block(num_tokens)
        found = [self.pool.lookup(block_hash) for block_hash in hashes[first : num_tokens // self.block_size]]
        self.pool.acquire(block_id for block_id in found if block_id is not None)  # first, so that they stay cached
        new_blocks = self.pool.allocate(sum(block_id is None for block_id in found))
        rest = iter(new_blocks)
        return BlockTable(first, [next(rest) if block_id is None else block_id for block_id in found]), new_blocks

    def start(self, table: BlockTable, num_prompt_tokens: int, num_tokens: int) -> None:
        """Called when a request starts, once it holds the blocks of its prefix.

        Args:
            table: Its block table.
            num_prompt_tokens: Tokens of its prompt.
            num_tokens: Its known tokens, those of an earlier life included.
        """
        table.ends = num_prompt_tokens, num_tokens

    def num_missing(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks that a request lacks for its first ``num_tokens``."""
        return max(0, -(-num_tokens // self.block_size) - table.num_blocks)

    def can_fit(self, cached: BlockTable, num_tokens: int) -> bool:
        """Whether that many tokens fit after a cached prefix, given the window if there is one."""
        live = min(
            -(-num_tokens // self.block_size) - cached.first,
            max(self.shape.max_live_blocks(num_tokens, self.step_tokens), len(cached.block_ids)),
        )
        needed = live - len(cached.block_ids)
        return needed <= self.pool.num_free - self.pool.num_free_among(cached.block_ids)

    def grow(self, table: BlockTable, num_tokens: int, slot: int, updates: list[int]) -> int | None:
        """Adds the blocks that a request lacks for its first ``num_tokens``, or none if too few are free.

        Args:
            table: The request's block table.
            num_tokens: Tokens that must fit.
            slot: The request's slot.
            updates: Extended by slot, index in the table and block id of each new block.

        Returns:
            Tokens that fit into the request's blocks; None: it got no blocks.
        """
        index = table.num_blocks
        count = -(-num_tokens // self.block_size) - index
        if count > 0:
            new_blocks = self._take(table, index, count)
            if new_blocks is None:
                return None
            table.block_ids += new_blocks
            for block_id in new_blocks:
                updates += (slot, index, block_id)
                index += 1
            table.num_blocks = index
        return index * self.block_size

    def _take(self, table: BlockTable, index: int, count: int) -> list[int] | None:
        """Holds ``count`` blocks for a table, from ``index`` on. None: too few are free."""
        return self.pool.allocate(count) if count <= self.pool.num_free else None

    def free_unseen(self, table: BlockTable, num_confirmed: int) -> None:
        """Frees the blocks that no token computed from now on attends to.

        Args:
            table: The request's block table.
            num_confirmed: Number of tokens before the first one that may still be computed.
        """
        count = self.shape.first_live_block(num_confirmed) - table.first
        if count > 0:
            assert count <= len(table.block_ids), "confirmed tokens have blocks"
            self.pool.release(table.block_ids[:count])
            del table.block_ids[:count]

    def publish(self, table: BlockTable, hashes: Sequence[bytes], num_tokens: int) -> None:
        """Adds a request's remaining blocks that its first ``num_tokens`` fill to the prefix cache."""
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

    def keep(self, table: BlockTable, num_tokens: int) -> None:
        """Releases the blocks behind a request's first ``num_tokens``; the others will be published anew."""
        first = table.first
        count = -(-num_tokens // self.block_size) - first
        assert 0 <= count <= len(table.block_ids), "what was computed has blocks"
        self.pool.release(table.block_ids[count:])
        del table.block_ids[count:]
        table.num_blocks = first + count
        table.num_published = 0

    def discard(self, table: BlockTable, hashes: Sequence[bytes]) -> None:
        """Removes a request's blocks from the prefix cache, including those outside the window."""
        for block_id in table.block_ids:
            self.pool.forget(block_id)
        for block_hash in hashes[: table.first]:
            freed = self.pool.lookup(block_hash)
            if freed is not None:
                self.pool.forget(freed)


class FullAttentionManager(SingleTypeKVCacheManager):
    """Full attention: a token attends to all before it."""

    def longest_hit(
        self, hashes: Sequence[bytes], num_tokens: int, alignment: int, has: Callable[[bytes], bool]
    ) -> int:
        num_blocks = 0
        for block_hash in hashes[: num_tokens // self.block_size]:
            if not has(block_hash):
                break
            num_blocks += 1
        return num_blocks * self.block_size // alignment * alignment


class SlidingWindowManager(SingleTypeKVCacheManager):
    """Sliding window: blocks outside the window are freed while the request runs."""

    def longest_hit(
        self, hashes: Sequence[bytes], num_tokens: int, alignment: int, has: Callable[[bytes], bool]
    ) -> int:
        begin = num_tokens // self.block_size
        while num_tokens:
            # Blocks from ``begin`` to the prefix's end are cached. Blocks before the window need not be. The last one
            # must be, even if the next token does not attend to it: a hit must be something that was computed.
            first = min(self.shape.first_live_block(num_tokens), num_tokens // self.block_size - 1)
            while begin > first and has(hashes[begin - 1]):
                begin -= 1
            if begin <= first:
                return num_tokens
            num_tokens = (begin - 1) * self.block_size // alignment * alignment
            begin = num_tokens // self.block_size
        return 0


class StateManager(SlidingWindowManager):
    """States: a sequence needs the last one. Others are kept where ``Snapshots`` says so.

    A state is written when its block's last token is computed, unless the next block has the same memory; it may be
    published if that is never so.
    """

    def __init__(self, shape: GroupShape, step_tokens: int) -> None:
        super().__init__(shape, step_tokens)
        assert shape.snapshots is not None
        self.snapshots = shape.snapshots

    def start(self, table: BlockTable, num_prompt_tokens: int, num_tokens: int) -> None:
        table.ends = self.snapshots.end_of_prompt(num_prompt_tokens), self.snapshots.end_of_prompt(num_tokens)

    def num_missing(self, table: BlockTable, num_tokens: int) -> int:
        indexes = range(table.num_blocks, -(-num_tokens // self.block_size))
        return sum(self._is_new(table, index) for index in indexes)

    def _is_new(self, table: BlockTable, index: int) -> bool:
        """Whether a block has memory of its own, as the one before it keeps its state."""
        return index == table.num_cached or self.snapshots.is_due(index * self.block_size, table.ends)

    def _take(self, table: BlockTable, index: int, count: int) -> list[int] | None:
        is_new = [self._is_new(table, place) for place in range(index, index + count)]
        if sum(is_new) > self.pool.num_free:
            return None
        new_blocks = iter(self.pool.allocate(sum(is_new)))
        taken: list[int] = []
        last = table.block_ids[-1] if table.block_ids else None
        for is_own in is_new:
            if is_own:
                last = next(new_blocks)
            else:
                assert last is not None, "the block before is there"
                self.pool.acquire([last])
            taken.append(last)
        return taken

    def publish(self, table: BlockTable, hashes: Sequence[bytes], num_tokens: int) -> None:
        first, size = table.first, self.block_size
        num_full = num_tokens // size
        for index in range(max(table.num_published, first), num_full):
            end = (index + 1) * size
            if not self.snapshots.is_due(end, table.ends):
                continue
            if not self.pool.publish(table.block_ids[index - first], hashes[index]):
                continue
            if table.temporary is not None:
                self.pool.drop(table.temporary)
            is_temporary = self.snapshots.is_temporary(end, table.ends)
            table.temporary = hashes[index] if is_temporary else None
        table.num_published = max(table.num_published, num_full)


def create_manager(shape: GroupShape, step_tokens: int) -> SingleTypeKVCacheManager:
    """Creates the manager for a group's kind of attention."""
    if shape.snapshots is not None:
        return StateManager(shape, step_tokens)
    kind = FullAttentionManager if shape.window is None else SlidingWindowManager
    return kind(shape, step_tokens)
