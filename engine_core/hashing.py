"""Names for the content of KV blocks: equal hashes mean equal K and V.

A full block is known by a SHA-256 hash chained over the tokens of its request, from a root that holds what changes
every K and V (salt, adapter). What changes K and V from some token on, an image, is a key of the block in which it
begins: blocks before it keep their hashes, and all after it inherit the change through the chain.

Everything here is a pure function, so whoever knows a request knows its hashes: the engine core finds cached blocks
by them, and a router can tell which engine has them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from hashlib import sha256

from engine_core.messages import I32, MultiModalFeature

HASH_SIZE = 32
"""Bytes of a hash."""

NO_KEYS: Mapping[int, bytes] = {}


def root_hash(*, cache_salt: str = "", adapter_hash: str = "") -> bytes:
    """The hash before the first block.

    Args:
        cache_salt: Prompts of different salts share nothing.
        adapter_hash: Content hash of the adapter; empty: none. A name would not do: another adapter may get it.
    """
    parts = [cache_salt.encode(), adapter_hash.encode()]
    return sha256(b"".join(struct.pack("<Q", len(part)) + part for part in parts)).digest()


def feature_keys(features: Iterable[MultiModalFeature], block_size: int) -> dict[int, bytes]:
    """Extra keys of the blocks in which images and sounds begin.

    Args:
        features: Of one prompt.
        block_size: Tokens in a block.

    Returns:
        Index of a block -> its key.
    """
    keys: dict[int, bytes] = {}
    for feature in sorted(features, key=lambda feature: feature.offset):
        block = feature.offset // block_size
        place = struct.pack("<QQ", feature.offset, feature.length)
        keys[block] = keys.get(block, b"") + sha256(feature.identifier.encode()).digest() + place
    return keys


def block_hashes(
    token_ids: I32, block_size: int, parent: bytes, extra_keys: Mapping[int, bytes] = NO_KEYS, first_block: int = 0
) -> list[bytes]:
    """Hashes of full blocks.

    Args:
        token_ids: int32 [n], from the first token of ``first_block`` on; what fills no block at its end is ignored.
        block_size: Tokens in a block.
        parent: Hash of the block before, or the root.
        extra_keys: Index of a block, counted from the request's start -> what K and V depend on from that block on.
        first_block: Index of the block in which ``token_ids`` begins.

    Returns:
        A hash of ``HASH_SIZE`` bytes for each full block.
    """
    hashes: list[bytes] = []
    data, step = token_ids.tobytes(), block_size * 4
    start, end = 0, step
    while end <= len(data):
        content = parent + data[start:end]
        if extra_keys:
            content += extra_keys.get(first_block + len(hashes), b"")
        parent = sha256(content).digest()
        hashes.append(parent)
        start, end = end, end + step
    return hashes
