"""Which blocks hold a request's KV cache, and which of them other requests may share.

Full blocks are known by a SHA-256 hash chained over the request's tokens, so equal hashes mean equal prefixes; the
chain starts with everything beside the tokens that changes K and V (salt, adapter, images).
"""

from __future__ import annotations

import hashlib

from engine_core.block_pool import BlockPool
from engine_core.messages import I32
from engine_core.request import Request


class KVCacheManager:
    """Gives blocks to requests. The only writer of the block pool and of ``Request.block_ids``."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_blocks)
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    @property
    def usage(self) -> float:
        """Share of blocks in use, 0 to 1."""
        return 1 - self.pool.num_free / self.pool.num_blocks

    def find_cached_blocks(self, request: Request) -> list[int]:
        """The longest cached prefix of a waiting request, as blocks. At least one token is left to compute."""
        if not self._reads_cache(request):
            return []
        self.extend_hashes(request, request.token_ids)
        blocks: list[int] = []
        for block_hash in request.block_hashes[: (len(request.token_ids) - 1) // self.block_size]:
            block_id = self.pool.lookup(block_hash)
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def _reads_cache(self, request: Request) -> bool:
        return self.enable_prefix_caching and not request.needs_all_positions

    def can_fit(self, cached_blocks: list[int], num_tokens: int) -> bool:
        """Whether that many tokens fit when the request starts with these cached blocks."""
        needed = -(-num_tokens // self.block_size) - len(cached_blocks)
        return needed <= self.pool.num_free - self.pool.num_free_among(cached_blocks)

    def start(self, request: Request, cached_blocks: list[int], num_tokens: int) -> None:
        """Gives a request its cached blocks and new ones, enough for ``num_tokens``."""
        assert not request.block_ids
        self.pool.acquire(cached_blocks)
        request.block_ids = list(cached_blocks)
        self.grow(request, -(-num_tokens // self.block_size) - len(cached_blocks))
        if self._reads_cache(request) and request.num_cached_tokens is None:
            self.num_queried_tokens += len(request.token_ids)
            self.num_hit_tokens += len(cached_blocks) * self.block_size

    def grow(self, request: Request, count: int) -> list[int]:
        """Adds blocks to a request and returns them; there must be enough free ones."""
        new_blocks = self.pool.allocate(count)
        request.block_ids += new_blocks
        return new_blocks

    def release(self, request: Request) -> None:
        """Takes all blocks from a request."""
        self.pool.release(request.block_ids)
        request.block_ids = []

    def discard(self, request: Request) -> None:
        """Takes all blocks from a request whose K and V are not to be trusted."""
        for block_id in request.block_ids:
            self.pool.forget(block_id)
        self.release(request)

    def extend_hashes(self, request: Request, token_ids: I32) -> None:
        """Hashes the full blocks of ``token_ids`` that are not hashed yet."""
        size = self.block_size
        hashes = request.block_hashes
        num_full = len(token_ids) // size
        if len(hashes) >= num_full:
            return
        parent = hashes[-1] if hashes else _root(request)
        first = len(hashes)
        data = token_ids[first * size : num_full * size].tobytes()
        step = size * 4
        for start in range(0, len(data), step):
            parent = hashlib.sha256(parent + data[start : start + step]).digest()
            hashes.append(parent)

    def publish(self, request: Request, token_ids: I32, first: int, count: int) -> None:
        """Makes blocks ``first .. count - 1`` findable; all tokens of them are in ``token_ids``."""
        self.extend_hashes(request, token_ids[: count * self.block_size])
        for position in range(first, count):
            self.pool.publish(request.block_ids[position], request.block_hashes[position])


def _root(request: Request) -> bytes:
    """Everything but the tokens that K and V depend on."""
    message = request.message
    seed = hashlib.sha256(message.cache_salt.encode())
    if message.lora_request is not None:
        seed.update(b"\0lora\0" + message.lora_request.name.encode())
    for feature in message.mm_features:
        seed.update(f"\0mm\0{feature.identifier}\0{feature.offset}\0{feature.length}".encode())
    return seed.digest()
