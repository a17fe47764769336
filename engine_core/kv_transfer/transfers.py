"""Loads prefixes of waiting requests from a store, and stores those of requests that end.

A request whose prefix is stored waits outside the queue while blocks that were reserved for it are filled; then it
starts as if they had been cached all along. Whatever fails is computed. Blocks being stored are held, so that no plan
writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from engine_core.kv_cache_manager import KVCacheManager, PrefixHit
from engine_core.kv_transfer.base import Key, KVConnector
from engine_core.request import Request
from engine_core.single_type_kv_cache_manager import BlockTable
from executor.messages import FinishedTransfer, KVTransfer

MIN_TOKENS = 64
"""Prefixes that gain less than this are computed, and shorter texts are not stored."""
MAX_HELD = 8
"""A transfer that stores blocks holds at most one in this many of the cache, or two."""


@dataclass
class _Transfer:
    """Blocks on their way."""

    message: KVTransfer
    keys: list[Key]
    missing: set[int]
    """Ranks that have not answered."""
    succeeded: np.ndarray[tuple[int], np.dtype[np.bool_]]
    tables: list[BlockTable]
    """The blocks it holds, by group; those of a request that loads are the request's."""
    request: Request | None = None
    """The request that loads; None: it is gone, or the blocks are stored."""
    num_tokens: int = 0
    """Tokens that the request will have."""
    followers: list[Request] = field(default_factory=list)
    """Other requests that wait for the same blocks."""


class KVTransfers:
    """The transfers in flight, and the requests that wait for them."""

    def __init__(self, kv: KVCacheManager, connector: KVConnector, num_ranks: int) -> None:
        self._kv = kv
        self._connector = connector
        self._num_ranks = num_ranks
        self._transfers: dict[int, _Transfer] = {}
        self._keys: dict[Key, int] = {}
        """Blocks on their way -> transfer."""
        self._waiting: dict[int, Request] = {}
        self._messages: list[KVTransfer] = []
        self._last_id = 0

    @property
    def location(self) -> str:
        """How workers find the store."""
        return self._connector.location

    @property
    def num_waiting(self) -> int:
        """Requests that wait for blocks."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        return not self._transfers

    def take_messages(self) -> list[KVTransfer]:
        """Messages for the workers, to be sent before the next plan."""
        messages, self._messages = self._messages, []
        return messages

    def held(self, group: int) -> Iterator[list[int]]:
        """The blocks of a group that transfers hold."""
        for transfer in self._transfers.values():
            if transfer.request is None:
                yield transfer.tables[group].block_ids

    # -- loads -----------------------------------------------------------------------------------------------

    def load(self, request: Request, hit: PrefixHit) -> bool:
        """Begins to load the prefix of a waiting request, for whose tokens there is room.

        Returns:
            Whether the request must wait.
        """
        if request.num_kept_tokens or not self._kv.reads_cache(request):
            return False
        gain = self._connector.get_num_new_matched_tokens(self._kv, request, hit.num_tokens)
        self._kv.num_queried_externally += len(request.token_ids) - hit.num_tokens
        if gain < MIN_TOKENS:
            return False
        num_tokens = hit.num_tokens + gain
        keys = self._kv.missing_keys(request, num_tokens)
        for key in keys:
            if key in self._keys:  # on its way to this place, or to the store
                self._transfers[self._keys[key]].followers.append(request)
                self._waiting[request.index] = request
                return True
        block_ids = self._kv.reserve(request, num_tokens)
        self._kv.num_hit_externally += gain
        self._connector.use(reversed(keys))
        self._waiting[request.index] = request
        self._start(keys, block_ids, request.block_tables, request, num_tokens)
        return True

    def forget(self, request: Request) -> bool:
        """Drops a request. Returns whether it waited for blocks; they stay reserved until nothing fills them."""
        if self._waiting.pop(request.index, None) is None:
            return False
        for transfer in self._transfers.values():
            if transfer.request is request:
                transfer.request = None
                request.block_tables = []
            elif request in transfer.followers:
                transfer.followers.remove(request)
        return True

    # -- saves -----------------------------------------------------------------------------------------------

    def save(self, request: Request) -> None:
        """Begins to store the cached blocks of a request that ends."""
        keys: list[Key] = []
        block_ids: list[int] = []
        known: list[Key] = []
        for group, manager in enumerate(self._kv.managers):
            hashes = request.block_hashes.get(manager.block_size, [])
            if len(hashes) * manager.block_size < MIN_TOKENS:
                return
            room = max(2, manager.pool.num_blocks // MAX_HELD)
            for block_hash in hashes:
                key = group, block_hash
                if key in self._connector:
                    known.append(key)
                    continue
                block_id = manager.pool.lookup(block_hash)
                if block_id is None or key in self._keys or room <= 0:
                    if manager.shape.window is None:
                        break  # nobody could use what follows
                    continue
                room -= 1
                keys.append(key)
                block_ids.append(block_id)
        self._connector.use(reversed(known))
        if not keys:
            return
        tables = []
        for group, manager in enumerate(self._kv.managers):
            own = [block_id for (of, _), block_id in zip(keys, block_ids, strict=True) if of == group]
            manager.pool.acquire(own)
            tables.append(BlockTable(0, own))
        self._start(keys, block_ids, tables, removed=self._connector.add(keys[::-1]))

    # -- both ------------------------------------------------------------------------------------------------

    def _start(
        self,
        keys: list[Key],
        block_ids: list[int],
        tables: list[BlockTable],
        request: Request | None = None,
        num_tokens: int = 0,
        removed: tuple[str, ...] = (),
    ) -> None:
        self._last_id += 1
        message = KVTransfer(
            transfer_id=self._last_id,
            is_load=request is not None,
            hashes=tuple(block_hash for _, block_hash in keys),
            groups=bytes(group for group, _ in keys),
            block_ids=np.array(block_ids, np.int32).tobytes(),
            removed=removed,
        )
        self._messages.append(message)
        ranks = set(range(self._num_ranks))
        succeeded = np.ones(len(keys), np.bool_)
        self._transfers[self._last_id] = _Transfer(message, keys, ranks, succeeded, tables, request, num_tokens)
        self._keys |= dict.fromkeys(keys, self._last_id)

    def finished(self, answer: FinishedTransfer, requeue: Callable[[Request], None]) -> None:
        """Takes the answer of a rank. Once all have answered, requests that waited go back to the queue.

        Args:
            answer: The answer.
            requeue: Called with each of these requests.
        """
        transfer = self._transfers.get(answer.transfer_id)
        if transfer is None:
            return
        transfer.succeeded &= np.frombuffer(answer.succeeded, np.bool_)
        transfer.missing.discard(answer.rank)
        if transfer.missing:
            return
        del self._transfers[answer.transfer_id]
        for key in transfer.keys:
            del self._keys[key]
        failed = [key for key, well in zip(transfer.keys, transfer.succeeded.tolist(), strict=True) if not well]
        self._connector.discard(failed)
        if transfer.request is not None:
            self._start_with(transfer.request, transfer, failed)
        else:
            for manager, table in zip(self._kv.managers, transfer.tables, strict=True):
                manager.pool.release(table.block_ids)
        for request in (transfer.request, *transfer.followers):
            if request is not None:
                del self._waiting[request.index]
                requeue(request)

    def _start_with(self, request: Request, transfer: _Transfer, failed: list[Key]) -> None:
        """Lets a request start with the blocks that were loaded for it, or without any if one is missing."""
        gone = set(failed)
        block_ids = np.frombuffer(transfer.message.block_ids, np.int32).tolist()
        for (group, block_hash), block_id in zip(transfer.keys, block_ids, strict=True):
            if (group, block_hash) not in gone:
                self._kv.managers[group].pool.publish(block_id, block_hash)
        if failed:
            self._kv.release(request)  # the next lookup finds what is there
        else:
            request.num_kept_tokens = transfer.num_tokens

    def restart(self, requeue: Callable[[Request], None]) -> None:
        """Adapts to new workers: nothing is in flight any more."""
        for transfer in self._transfers.values():
            if transfer.request is not None:
                self._kv.release(transfer.request)
            else:
                for manager, table in zip(self._kv.managers, transfer.tables, strict=True):
                    manager.pool.release(table.block_ids)
                self._connector.discard(() if transfer.message.is_load else transfer.keys)
        waiting = list(self._waiting.values())
        self._transfers.clear()
        self._keys.clear()
        self._waiting.clear()
        self._messages.clear()
        for request in reversed(waiting):
            requeue(request)
