"""Assigns KV blocks to requests and lets requests share cached prefixes.

Layers with the same attention range form a group with its own blocks (``CacheShape``). A request has one block table
per group, and can continue after a cached prefix only if every group has all that its next token attends to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

from engine_core.block_pool import BlockPool
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
        self.num_queried_externally = 0
        """Tokens looked up in a store, and to be loaded from it."""
        self.num_hit_externally = 0
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

    def check_integrity(
        self, requests: Iterable[Request], held: Callable[[int], Iterable[Sequence[int]]] = lambda group: ()
    ) -> None:
        """Asserts that pools and prefix caches agree with the block tables of all requests, and with what else holds
        blocks, by group."""
        tables = [request.block_tables for request in requests if request.block_tables]
        for group, manager in enumerate(self.managers):
            manager.pool.check_integrity([*(own[group].block_ids for own in tables), *held(group)])

    # -- prefixes ------------------------------------------------------------------------------------------

    def find_cached_prefix(self, request: Request) -> PrefixHit:
        """The longest prefix of a waiting request that all groups have cached. Leaves at least one token to compute.

        A group has a prefix if it has everything that the next token attends to.
        """
        if request.block_tables:  # it kept what it had computed
            return PrefixHit(request.num_kept_tokens, request.block_tables)
        if not self.reads_cache(request):
            return PrefixHit(0, [BlockTable() for _ in self.managers])
        num_tokens = self.longest_prefix(request)
        pairs = zip(self.managers, self._hashes(request), strict=True)
        return PrefixHit(num_tokens, [manager.cached_table(own, num_tokens) for manager, own in pairs])

    def _hashes(self, request: Request) -> list[list[bytes]]:
        """Per group, the hashes of a waiting request's full blocks."""
        token_ids = request.token_ids
        return [self.hashes(request, token_ids, len(token_ids), manager.block_size) for manager in self.managers]

    def longest_prefix(self, request: Request, stored: Container[tuple[int, bytes]] = ()) -> int:
        """Length of the longest prefix of a waiting request that all groups have, but for one token.

        Args:
            request: A request that ``reads_cache``.
            stored: Blocks, by group and hash, that count as cached.
        """
        hashes = self._hashes(request)
        alignment = self.shape.alignment
        num_tokens = (len(request.token_ids) - 1) // alignment * alignment
        agreed = -1
        while num_tokens != agreed:  # a shorter prefix may move a window to blocks that are missing
            agreed = num_tokens
            for group, (manager, own) in enumerate(zip(self.managers, hashes, strict=True)):

                def has(block_hash: bytes, group: int = group, pool: BlockPool = manager.pool) -> bool:
                    return pool.lookup(block_hash) is not None or (group, block_hash) in stored

                num_tokens = manager.longest_hit(own, num_tokens, alignment, has)
        return num_tokens

    def missing_keys(self, request: Request, num_tokens: int) -> list[tuple[int, bytes]]:
        """The blocks, by group and hash, that a waiting request's prefix needs and the cache lacks, in order."""
        return [
            (group, block_hash)
            for group, (manager, hashes) in enumerate(zip(self.managers, self._hashes(request), strict=True))
            for block_hash in hashes[manager.shape.first_live_block(num_tokens) : num_tokens // manager.block_size]
            if manager.pool.lookup(block_hash) is None
        ]

    def reserve(self, request: Request, num_tokens: int) -> list[int]:
        """Gives a waiting request the blocks of its prefix: those that are cached, and new ones in place of others.

        Returns:
            The new ones, in the order of ``missing_keys``.
        """
        new_blocks: list[int] = []
        for manager, hashes in zip(self.managers, self._hashes(request), strict=True):
            table, own = manager.reserve(hashes, num_tokens)
            request.block_tables.append(table)
            new_blocks += own
        return new_blocks

    def reads_cache(self, request: Request) -> bool:
        """Whether a request may start with a cached prefix."""
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
        if not request.block_tables:
            request.block_tables = hit.tables
            for manager, table in zip(self.managers, hit.tables, strict=True):
                manager.pool.acquire(table.block_ids)
        for manager, table in zip(self.managers, request.block_tables, strict=True):
            manager.start(table, request.num_prompt_tokens, len(request.token_ids))
        request.num_kept_tokens = 0
        request.num_prefix_tokens = hit.num_tokens
        if self.reads_cache(request) and request.num_cached_tokens is None:
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
                missing[group] += manager.num_missing(table, num_tokens)
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

    def keep(self, request: Request, num_tokens: int, first_lost: int) -> bool:
        """Lets a request that must wait keep the blocks of its first ``num_tokens``, which it has computed or found.

        Args:
            request: A running request.
            num_tokens: Its tokens before the steps that are lost.
            first_lost: The first of these. What others were computing in them is lost, too.

        Returns:
            Whether it keeps any: blocks that had left a window may be missing.
        """
        for manager, table in zip(self.managers, request.block_tables, strict=True):
            lost = manager.pool.published_since(first_lost)
            for index in range(table.first, min(table.num_blocks, request.num_prefix_tokens // manager.block_size)):
                if table.block_ids[index - table.first] in lost:
                    num_tokens = min(num_tokens, index * manager.block_size)
                    break
        pairs = zip(self.managers, request.block_tables, strict=True)
        if num_tokens == 0 or any(table.first > manager.shape.first_live_block(num_tokens) for manager, table in pairs):
            return False
        for manager, table in zip(self.managers, request.block_tables, strict=True):
            manager.keep(table, num_tokens)
            manager.free_unseen(table, num_tokens)
        request.num_kept_tokens = num_tokens
        return True

    def holds_lost(self, request: Request, first_lost: int) -> bool:
        """Whether a request holds blocks that this step or later ones may have been computing."""
        pairs = zip(self.managers, request.block_tables, strict=False)
        return any(not manager.pool.published_since(first_lost).isdisjoint(table.block_ids) for manager, table in pairs)

    def begin_step(self, step_id: int, num_done: int) -> None:
        """Records that a step is being planned.

        Args:
            step_id: The step. Blocks published from now on may be computed by it.
            num_done: All ranks have computed the steps up to this one.
        """
        for manager in self.managers:
            manager.pool.step_id = step_id
            manager.pool.confirm(num_done)

    def forget_since(self, step_id: int) -> None:
        """Removes what this step and later ones were computing from the prefix cache."""
        for manager in self.managers:
            manager.pool.forget_since(step_id)

    def release(self, request: Request) -> None:
        """Releases all blocks of a request, if it has any."""
        request.num_kept_tokens = 0
        for manager, table in zip(self.managers, request.block_tables, strict=False):
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
