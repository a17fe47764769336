"""Assigns KV blocks to requests and lets requests share cached prefixes.

Layers with the same attention range form a group with its own blocks (``CacheShape``). A request has one block table
per group, and can continue after a cached prefix only if every group has all that its next token attends to.
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
    """The cached prefix of a waiting request."""

    num_tokens: int
    tables: list[BlockTable]
    """One table per group. The request does not hold the blocks yet."""


class KVCacheManager:
    """Coordinates the managers of all groups. The only writer of ``Request.block_tables``."""

    def __init__(self, shape: CacheShape, step_tokens: int, *, enable_prefix_caching: bool) -> None:
        """Creates the pools.

        Args:
            shape: The groups.
            step_tokens: Maximum tokens of a request planned beyond its confirmed ones.
            enable_prefix_caching: Whether blocks are cached for reuse.
        """
        self.shape = shape
        # Without groups there is nothing to cache.
        self.enable_prefix_caching = enable_prefix_caching and bool(shape.groups)
        self.managers = [create_manager(group, step_tokens) for group in shape.groups]
        self.has_windows = any(group.window is not None for group in shape.groups)
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0
        self.publish_step = math.gcd(*(group.block_size for group in shape.groups))
        """A block of some group may become full at each multiple of this many tokens."""

    # -- facts ---------------------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """Number of blocks in all groups together."""
        return sum(manager.pool.num_blocks for manager in self.managers)

    @property
    def num_free(self) -> int:
        """Number of unused blocks in all groups together."""
        return sum(manager.pool.num_free for manager in self.managers)

    @property
    def usage(self) -> float:
        """Fraction of blocks in use, 0 to 1, in the fullest group, which limits what else can run."""
        usage = 0.0
        for manager in self.managers:
            usage = max(usage, 1 - manager.pool.num_free / manager.pool.num_blocks)
        return usage

    def check_integrity(self, requests: Iterable[Request]) -> None:
        """Asserts that pools and prefix caches agree with the block tables of all requests."""
        tables = [request.block_tables for request in requests if request.block_tables]
        for group, manager in enumerate(self.managers):
            manager.pool.check_integrity(own[group].block_ids for own in tables)

    # -- prefixes ------------------------------------------------------------------------------------------

    def find_cached_prefix(self, request: Request) -> PrefixHit:
        """The longest prefix of a waiting request that all groups have cached. Leaves at least one token to compute.

        A group has a prefix if it has everything that the next token attends to.
        """
        if not self._reads_cache(request):
            return PrefixHit(0, [BlockTable() for _ in self.managers])
        token_ids = request.token_ids
        hashes = [self.hashes(request, token_ids, len(token_ids), manager.block_size) for manager in self.managers]
        alignment = self.shape.alignment
        num_tokens = (len(token_ids) - 1) // alignment * alignment
        agreed = -1
        while num_tokens != agreed:  # a shorter prefix may move a window to blocks that are missing
            agreed = num_tokens
            for manager, own in zip(self.managers, hashes, strict=True):
                num_tokens = manager.longest_hit(own, num_tokens, alignment)
        pairs = zip(self.managers, hashes, strict=True)
        return PrefixHit(num_tokens, [manager.cached_table(own, num_tokens) for manager, own in pairs])

    def _reads_cache(self, request: Request) -> bool:
        return self.enable_prefix_caching and not request.needs_all_positions

    def hashes(self, request: Request, token_ids: I32, num_tokens: int, block_size: int) -> list[bytes]:
        """The hashes of a request's full blocks; computes the new ones.

        Args:
            request: The request.
            token_ids: int32 [>= num_tokens].
            num_tokens: Number of known tokens.
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
        """Adds full blocks to the prefix cache.

        Args:
            request: The request that holds them.
            token_ids: int32 [>= num_tokens], the request's tokens.
            num_tokens: Number of tokens known and computed.
        """
        for group, manager in enumerate(self.managers):
            hashes = self.hashes(request, token_ids, num_tokens, manager.block_size)
            manager.publish(request.block_tables[group], hashes, num_tokens)

    def reset_prefix_cache(self) -> None:
        """Empties the prefix cache; requests keep their blocks."""
        for manager in self.managers:
            manager.pool.forget_all()

    # -- blocks of requests --------------------------------------------------------------------------------

    def can_fit(self, hit: PrefixHit, num_tokens: int) -> bool:
        """Whether this many tokens fit if the request starts with a cached prefix."""
        return all(manager.can_fit(table, num_tokens) for manager, table in zip(self.managers, hit.tables, strict=True))

    def start(self, request: Request, hit: PrefixHit, num_tokens: int) -> int:
        """Gives a request its cached blocks and enough new ones for ``num_tokens``.

        Returns:
            Tokens that fit into its blocks.
        """
        assert not request.block_tables
        request.block_tables = hit.tables
        for manager, table in zip(self.managers, hit.tables, strict=True):
            manager.pool.acquire(table.block_ids)
        if self._reads_cache(request) and request.num_cached_tokens is None:
            self.num_queried_tokens += len(request.token_ids)
            self.num_hit_tokens += hit.num_tokens
        capacity = self.grow(request, num_tokens, [[] for _ in self.managers])
        assert capacity is not None, "a request that starts fits"
        return capacity

    def can_grow(self, wanted: Iterable[tuple[Request, int]]) -> bool:
        """Whether all these requests can grow to the given numbers of tokens without preempting others."""
        missing = [0] * len(self.managers)
        for request, num_tokens in wanted:
            for group, (manager, table) in enumerate(zip(self.managers, request.block_tables, strict=True)):
                missing[group] += max(0, -(-num_tokens // manager.block_size) - table.num_blocks)
        return all(count <= manager.pool.num_free for manager, count in zip(self.managers, missing, strict=True))

    def grow(self, request: Request, num_tokens: int, updates: list[list[int]]) -> int | None:
        """Adds the blocks that a request lacks for its first ``num_tokens``, or none if a group has too few free ones.

        Args:
            request: The request, with its block tables.
            num_tokens: Tokens that must fit.
            updates: Per group, block updates for the workers, extended by (slot, index in its block table, block)
                triples.

        Returns:
            Tokens that fit into the request's blocks; None: it got no blocks.
        """
        if len(self.managers) > 1 and not self.can_grow([(request, num_tokens)]):
            return None
        capacity = NEVER
        for manager, table, new in zip(self.managers, request.block_tables, updates, strict=True):
            fitting = manager.grow(table, num_tokens, request.slot, new)
            if fitting is None:
                return None
            if fitting < capacity:
                capacity = fitting
        return capacity

    def free_unseen(self, request: Request, num_confirmed: int) -> int:
        """Frees the blocks of a running request that have left their windows.

        The next plan may reassign them: workers execute plans in order, so steps in flight that still attend to the
        blocks will have read them by then.

        Args:
            request: A running request.
            num_confirmed: Tokens that precede everything still to be computed, whatever the outcome of steps in flight.

        Returns:
            The number of confirmed tokens at which the next block can be freed.
        """
        following = NEVER
        for manager, table in zip(self.managers, request.block_tables, strict=True):
            window = manager.shape.window
            if window is not None:
                manager.free_unseen(table, num_confirmed)
                following = min(following, (table.first + 1) * manager.block_size + window - 1)
        return following

    def release(self, request: Request) -> None:
        """Releases all blocks of a request."""
        for manager, table in zip(self.managers, request.block_tables, strict=True):
            manager.pool.release(table.block_ids)
        request.block_tables = []

    def discard(self, request: Request) -> None:
        """Removes a request's blocks from the prefix cache, since their K and V cannot be trusted. The request keeps
        them."""
        for manager, table in zip(self.managers, request.block_tables, strict=True):
            manager.discard(table, request.block_hashes.get(manager.block_size, ()))


def _root(request: Request) -> bytes:
    message = request.message
    adapter = message.lora_request
    return root_hash(cache_salt=message.cache_salt, adapter_hash="" if adapter is None else adapter.content_hash)
