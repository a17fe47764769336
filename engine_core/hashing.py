"""Content hashes of KV blocks: equal hashes mean equal K and V.

A full block is identified by a SHA-256 hash chained over the request's tokens, from a root that covers everything
affecting all K and V (salt, adapter). Input that affects K and V from some token on, such as an image, is an extra key
of the block in which it begins: earlier blocks keep their hashes, and later ones inherit the change through the chain.

All functions are pure, so anyone who has a request can compute its hashes: the engine core looks up cached blocks with
them, and a router can tell which engine has them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import sha256

from engine_core.messages import I32, MultiModalFeature
from executor.adapter_files import AdapterFileError, adapter_hash, rescaled

__all__ = ["HASH_SIZE", "AdapterFileError", "adapter_hash", "block_hashes", "draft_pool", "rescaled", "root_hash"]

HASH_SIZE = 32
"""Size of a hash in bytes."""

NO_KEYS: Mapping[int, bytes] = {}


@lru_cache(maxsize=256)
def root_hash(*, cache_salt: str = "", adapter_hash: str = "") -> bytes:
    """The hash before the first block.

    Args:
        cache_salt: Prompts with different salts share no blocks.
        adapter_hash: Content hash of the adapter; empty: none. Not its name, which may be reassigned.
    """
    parts = [cache_salt.encode(), adapter_hash.encode()]
    return sha256(b"".join(struct.pack("<Q", len(part)) + part for part in parts)).digest()


@lru_cache(maxsize=256)
def draft_pool(tenant: tuple[str, str], cache_salt: str) -> int:
    """A number below 2**63 for the requests whose drafts may come from each other's outputs: those of one user with one
    salt. Otherwise the speed of an answer would tell what others were answered."""
    parts = [part.encode() for part in (*tenant, cache_salt)]
    digest = sha256(b"".join(struct.pack("<Q", len(part)) + part for part in parts)).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def feature_keys(features: Iterable[MultiModalFeature], block_size: int) -> dict[int, bytes]:
    """Extra keys of the blocks in which images and audio begin.

    Args:
        features: Features of one prompt.
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
        token_ids: int32 [n], starting with the first token of ``first_block``; an incomplete last block is ignored.
        block_size: Tokens in a block.
        parent: Hash of the preceding block, or the root.
        extra_keys: Block index, from the start of the request -> extra key on which K and V depend from that block on.
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
