"""Reference counts, the free list and the prefix cache of the block pool."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.block_pool import BlockPool


def test_blocks_are_reused_in_the_order_in_which_they_became_free() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    for number, block in enumerate(first + second):
        pool.publish(block, bytes([number]))
    pool.release(first)
    pool.release(second)
    # The end of each sequence goes first: its beginning is what others may share.
    assert pool.allocate(4) == [first[1], first[0], second[1], second[0]]
    assert pool.lookup(b"\x00") is None


def test_blocks_without_cached_content_are_reused_first() -> None:
    pool = BlockPool(2)
    cached, empty = pool.allocate(2)
    pool.publish(cached, b"a")
    pool.release([cached])
    pool.release([empty])
    assert pool.allocate(1) == [empty]
    assert pool.lookup(b"a") == cached


def test_a_cached_block_is_shared_and_survives_its_first_user() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    pool.acquire([block])
    pool.release([block])
    assert pool.num_free == 1
    pool.release([block])
    assert pool.num_free == 2
    pool.acquire([block])
    assert pool.num_free == 1 and pool.lookup(b"a") == block


def test_the_first_of_two_blocks_with_one_content_stays_findable() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    assert pool.lookup(b"a") == first
    pool.check_integrity([[first], [second]])


def test_releasing_too_often_is_noticed() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="too often"):
        pool.release(blocks)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["new", "share", "drop", "publish"]), st.integers(0, 30)), max_size=60))
def test_any_order_of_operations_keeps_the_books(operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(8)
    users: list[list[int]] = []
    hashes = 0
    for kind, number in operations:
        if kind == "new" and pool.num_free:
            users.append(pool.allocate(1 + number % pool.num_free))
        elif kind == "share" and users:
            blocks = users[number % len(users)][:1]
            pool.acquire(blocks)
            users.append(list(blocks))
        elif kind == "drop" and users:
            pool.release(users.pop(number % len(users)))
        elif kind == "publish" and users:
            block = users[number % len(users)][-1]
            if pool._hashes[block] is None:
                hashes += 1
                pool.publish(block, str(number % 5).encode())
        pool.check_integrity(users)
    for blocks in users:
        pool.release(blocks)
    assert pool.num_free == pool.num_blocks
