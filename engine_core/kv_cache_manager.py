"""Which blocks hold a request's KV cache, and which of them other requests may share.

Layers that see equally far back form a group with blocks of its own (``CacheShape``). A request has a block table per
group, and goes on after a cached prefix only where all groups have what its next token sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from engine_core.cache_shape import CacheShape
from engine_core.hashing import NO_KEYS, block_hashes, feature_keys, root_hash
from engine_core.messages import I32
from engine_core.request import Request
from engine_core.single_type_kv_cache_manager import NEVER, BlockTable, create_manager


@dataclass(frozen=True)
class PrefixHit:
    """The cached beginning of a waiting request."""

    num_tokens: int
    tables: list[BlockTable]
    """One per group. The request does not hold the blocks yet."""


class KVCacheManager:
    """Coordinates the managers of all groups. The only writer of ``Request.block_tables``."""

    def __init__(self, shape: CacheShape, step_tokens: int, *, enable_prefix_caching: bool) -> None:
        """Creates the pools.

        Args:
            shape: The groups.
            step_tokens: The most tokens of a request that are planned beyond what is confirmed of it.
            enable_prefix_caching: Whether blocks may be found again.
        """
        self.shape = shape
        # Without a group there is nothing that a prefix could be found in.
        self.enable_prefix_caching = enable_prefix_caching and bool(shape.groups)
        self.managers = [create_manager(group, step_tokens) for group in shape.groups]
        self.has_windows = any(group.window is not None for group in shape.groups)
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.publish_step = math.gcd(*(group.block_size for group in shape.groups))
        """A block of some group may be full after each multiple of so many tokens."""

    # -- facts ---------------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """Of all groups together."""
        return sum(manager.pool.num_blocks for manager in self.managers)

    @property
    def num_free(self) -> int:
        """Blocks that nothing uses, of all groups together."""
        return sum(manager.pool.num_free for manager in self.managers)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0 to 1, of the fullest group: it decides what else can run."""
        return max((1 - manager.pool.num_free / manager.pool.num_blocks for manager in self.managers), default=0.0)

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Asserts that pools and prefix caches agree with the block tables of all requests."""
        tables = [request.block_tables for request in requests if request.block_tables]
        for group, manager in enumerate(self.managers):
            manager.pool.check_integrity(own[group].block_ids for own in tables)

    # -- prefixes ------------------------------------------------------------------------------------------

    def find_cached_prefix(self, request: Request) -> PrefixHit:
        """The longest cached prefix of a waiting request that all groups have. At least one token is left to compute.

        A group has a prefix if it has all that the token after it sees.
        """
        if not self._reads_cache(request):
            return PrefixHit(0, [BlockTable() for _ in self.managers])
        token_ids = request.token_ids
        hashes = [self.hashes(request, token_ids, len(token_ids), manager.block_size) for manager in self.managers]
        alignment = self.shape.alignment
        num_tokens = (len(token_ids) - 1) // alignment * alignment
        agreed = -1
        while num_tokens != agreed:  # what one group lacks may be where another one's window is
            agreed = num_tokens
            for manager, own in zip(self.managers, hashes, strict=True):
                num_tokens = manager.longest_hit(own, num_tokens, alignment)
        pairs = zip(self.managers, hashes, strict=True)
        return PrefixHit(num_tokens, [manager.cached_table(own, num_tokens) for manager, own in pairs])

    def _reads_cache(self, request: Request) -> bool:
        return self.enable_prefix_caching and not request.needs_all_positions

    def hashes(self, request: Request, token_ids: I32, num_tokens: int, block_size: int) -> list[bytes]:
        """The hashes of a request's full blocks; those that are new are computed.

        Args:
            request: Whose they are.
            token_ids: int32 [>= num_tokens].
            num_tokens: Tokens that are known.
            block_size: Tokens in a block.
        """
        hashes = request.block_hashes.get(block_size)
        if hashes is None:
            hashes = request.block_hashes[block_size] = []
        begin = len(hashes) * block_size
        if begin + block_size <= num_tokens:
            parent = hashes[-1] if hashes else _root(request)
            features = request.message.mm_features
            keys = feature_keys(features, block_size) if features else NO_KEYS
            hashes += block_hashes(token_ids[begin:num_tokens], block_size, parent, keys, len(hashes))
        return hashes

    def publish(self, request: Request, token_ids: I32, num_tokens: int) -> None:
        """Makes full blocks findable.

        Args:
            request: It has them.
            token_ids: int32 [>= num_tokens], the request's.
            num_tokens: Tokens that are known and computed.
        """
        for group, manager in enumerate(self.managers):
            hashes = self.hashes(request, token_ids, num_tokens, manager.block_size)
            manager.publish(request.block_tables[group], hashes, num_tokens)

    def reset_prefix_cache(self) -> None:
        """Nothing is cached any more; who uses blocks goes on using them."""
        for manager in self.managers:
            manager.pool.forget_all()

    # -- blocks of requests --------------------------------------------------------------------------------

    def can_fit(self, hit: PrefixHit, num_tokens: int) -> bool:
        """Whether that many tokens fit when the request starts with a cached prefix."""
        return all(manager.can_fit(table, num_tokens) for manager, table in zip(self.managers, hit.tables, strict=True))

    def start(self, request: Request, hit: PrefixHit, num_tokens: int) -> int:
        """Gives a request its cached blocks and new ones, enough for ``num_tokens``.

        Returns:
            Tokens that fit into them.
        """
        assert not request.block_tables
        request.block_tables = hit.tables
        for manager, table in zip(self.managers, hit.tables, strict=True):
            manager.pool.acquire(table.block_ids)
        if self._reads_cache(request) and request.num_cached_tokens is None:
            self.num_queried_tokens += len(request.token_ids)
            self.num_hit_tokens += hit.num_tokens
        capacity = self.grow(request, num_tokens, [[] for _ in self.managers])
        assert capacity is not None, "whoever starts fits"
        return capacity

    def can_grow(self, wanted: Iterable[tuple[Request, int]]) -> bool:
        """Whether all of these requests can have that many tokens each without taking blocks from others."""
        missing = [0] * len(self.managers)
        for request, num_tokens in wanted:
            for group, (manager, table) in enumerate(zip(self.managers, request.block_tables, strict=True)):
                missing[group] += max(0, -(-num_tokens // manager.block_size) - table.num_blocks)
        return all(count <= manager.pool.num_free for manager, count in zip(self.managers, missing, strict=True))

    def grow(self, request: Request, num_tokens: int, updates: list[list[int]]) -> int | None:
        """Adds the blocks that a request lacks for its first ``num_tokens``, or none if a group has too few.

        Args:
            request: It has its tables.
            num_tokens: Tokens that have to fit.
            updates: Per group, what workers will be told: slot, index in its block table and block, one after another.

        Returns:
            Tokens that fit into all blocks of the request; None: it got none.
        """
        tables = request.block_tables
        for group, manager in enumerate(self.managers):
            if -(-num_tokens // manager.block_size) - tables[group].num_blocks > manager.pool.num_free:
                return None
        capacity = NEVER
        for group, manager in enumerate(self.managers):
            fitting = manager.grow(tables[group], num_tokens, request.slot, updates[group])
            capacity = min(capacity, fitting)
        return capacity

    def free_unseen(self, request: Request, num_confirmed: int) -> int:
        """Frees the blocks of a running request that fell behind windows.

        The next plan may give them to others: workers execute plans in order, so steps in flight that still see the
        blocks have read them by then.

        Args:
            request: It runs.
            num_confirmed: Tokens that come before all that may still be computed, whatever becomes of steps in flight.

        Returns:
            The number of confirmed tokens from which on there is more to free.
        """
        following = NEVER
        for manager, table in zip(self.managers, request.block_tables, strict=True):
            window = manager.shape.window
            if window is not None:
                manager.free_unseen(table, num_confirmed)
                following = min(following, (table.first + 1) * manager.block_size + window - 1)
        return following

    def release(self, request: Request) -> None:
        """Takes all blocks from a request."""
        for manager, table in zip(self.managers, request.block_tables, strict=True):
            manager.pool.release(table.block_ids)
        request.block_tables = []

    def discard(self, request: Request) -> None:
        """Forgets what a request wrote: its K and V are not to be trusted. It still has its blocks."""
        for manager, table in zip(self.managers, request.block_tables, strict=True):
            manager.discard(table, request.block_hashes.get(manager.block_size, ()))


def _root(request: Request) -> bytes:
    message = request.message
    adapter = message.lora_request
    return root_hash(cache_salt=message.cache_salt, adapter_hash="" if adapter is None else adapter.content_hash)
