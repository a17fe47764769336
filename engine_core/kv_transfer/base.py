"""The seam to stores of K and V outside the cache: the engine core's half of a connector.

It knows what a store holds. ``KVTransfers`` reserves blocks for it, and the workers' half
(``executor/kv_transfer/base.py``) moves them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from engine_core.kv_cache_manager import KVCacheManager
from engine_core.request import Request

Key = tuple[int, bytes]
"""A KV cache group, and the hash of one of its blocks."""


class KVConnector(Protocol):
    """What a store holds, by key. Nothing here waits."""

    @property
    def location(self) -> str:
        """How workers find the store: ``InitKVCache.kv_store``."""

    def get_num_new_matched_tokens(self, kv: KVCacheManager, request: Request, num_computed_tokens: int) -> int:
        """How many tokens beyond those cached a waiting request finds if blocks are loaded.

        Args:
            kv: The KV cache.
            request: The request.
            num_computed_tokens: Length of its cached prefix.
        """

    def __contains__(self, key: object) -> bool: ...

    def use(self, keys: Iterable[Key]) -> None:
        """Records that blocks are used, the last ones first."""

    def add(self, keys: Sequence[Key]) -> tuple[str, ...]:
        """Adds blocks that are about to be stored.

        Returns:
            What must be removed to make room for them, as ``KVTransfer.removed``.
        """

    def discard(self, keys: Iterable[Key]) -> None:
        """Drops blocks that could not be stored or loaded."""
