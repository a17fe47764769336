"""Hashes of KV blocks: what changes K and V changes the hashes from there on, and nothing before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine_core.hashing import HASH_SIZE, block_hashes, feature_keys, root_hash
from engine_core.messages import I32, MultiModalFeature

ROOT = root_hash()


def tokens(count: int, seed: int = 0) -> I32:
    return np.random.default_rng(seed).integers(0, 1000, count).astype(np.int32)


def image(identifier: str, offset: int, length: int) -> MultiModalFeature:
    return MultiModalFeature(identifier, offset, length)


def hashes_with(*features: MultiModalFeature) -> list[bytes]:
    return block_hashes(tokens(40), 4, ROOT, feature_keys(features, 4))


def num_equal(first: list[bytes], second: list[bytes]) -> int:
    """Leading hashes that are equal; after them none is."""
    count = sum(a == b for a, b in zip(first, second, strict=True))
    assert first[:count] == second[:count]
    return count


def test_only_full_blocks_have_hashes() -> None:
    assert [len(block_hashes(tokens(n), 4, ROOT)) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]
    assert all(len(value) == HASH_SIZE for value in [ROOT, *block_hashes(tokens(8), 4, ROOT)])


@pytest.mark.parametrize("position", [0, 3, 4, 17, 39])
def test_a_token_counts_from_its_block_on(position: int) -> None:
    changed = tokens(40)
    changed[position] += 1
    assert num_equal(block_hashes(tokens(40), 4, ROOT), block_hashes(changed, 4, ROOT)) == position // 4


@pytest.mark.parametrize("cut", [4, 12, 36])
def test_hashes_continue_where_others_end(cut: int) -> None:
    keys = feature_keys([image("a", 2, 3), image("b", 12, 9), image("c", 14, 2)], 4)
    whole = block_hashes(tokens(40), 4, ROOT, keys)
    before = block_hashes(tokens(40)[:cut], 4, ROOT, keys)
    assert before + block_hashes(tokens(40)[cut:], 4, before[-1], keys, cut // 4) == whole


def test_salts_and_adapters_share_nothing() -> None:
    roots = [
        root_hash(),
        root_hash(cache_salt="a"),
        root_hash(adapter_hash="a"),
        root_hash(cache_salt="a", adapter_hash="b"),
        root_hash(cache_salt="ab"),
        root_hash(cache_salt="b", adapter_hash="a"),
    ]
    assert len(set(roots)) == len(roots)
    assert num_equal(block_hashes(tokens(8), 4, roots[0]), block_hashes(tokens(8), 4, roots[1])) == 0


def test_an_image_counts_from_its_first_block_on() -> None:
    assert num_equal(hashes_with(), hashes_with(image("a", 17, 10))) == 4
    assert num_equal(hashes_with(image("a", 17, 10)), hashes_with(image("b", 17, 10))) == 4
    # The same tokens, cut into images in another way.
    assert num_equal(hashes_with(image("a", 17, 10)), hashes_with(image("a", 17, 11))) == 4
    assert num_equal(hashes_with(image("a", 17, 10)), hashes_with(image("a", 18, 10))) == 4


def test_all_images_of_a_block_count() -> None:
    both = hashes_with(image("a", 5, 1), image("b", 6, 1))
    assert both == hashes_with(image("b", 6, 1), image("a", 5, 1)), "in the order of the prompt"
    assert num_equal(both, hashes_with(image("b", 5, 1), image("a", 6, 1))) == 1
    assert num_equal(both, hashes_with(image("a", 5, 1))) == 1
    assert num_equal(hashes_with(image("a", 5, 1), image("b", 30, 5)), hashes_with(image("a", 5, 1))) == 7


def test_hashes_are_those_of_other_processes_and_versions() -> None:
    """A router computes them elsewhere; a change would make what is stored under them unfindable."""
    hashes = block_hashes(
        np.arange(8, dtype=np.int32), 4, root_hash(cache_salt="s"), feature_keys([image("i", 5, 2)], 4)
    )
    assert [value.hex()[:16] for value in hashes] == ["992819eca22fa00d", "8ebf2e91eea7a47e"]


def test_a_router_needs_no_engine() -> None:
    code = (
        "import engine_core.hashing, sys; sys.exit(str({'zmq', 'torch', 'engine_core.scheduler'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stderr.strip() == "set()"
