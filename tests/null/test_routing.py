"""The choice of an engine among replicas."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from api.engine.routing import RUNNING_COST, Prefix, PrefixIndex, Router
from engine_core.cache_shape import GroupShape
from engine_core.hashing import block_hashes, feature_keys, root_hash
from engine_core.messages import MultiModalFeature
from engine_core.snapshots import Snapshots
from tests.null.test_scheduler import MAX_LEN, Engine, make_request, prompts

BLOCK = 32


def router(num_engines: int = 2, num_blocks: int = 100) -> Router:
    made = Router(num_engines)
    for engine in range(num_engines):
        made.engine_ready(engine, num_blocks, BLOCK)
    return made


def prompt(made: Router, start: int, count: int = 320, **fields: Any) -> Prefix:
    return made.prefix(np.arange(start, start + count, dtype=np.int32), **fields)


def test_prompts_have_the_hashes_that_engines_look_up() -> None:
    made = router()
    tokens = np.arange(100, dtype=np.int32)
    root = root_hash(cache_salt="salt")
    assert made.prefix(tokens, "salt") == (100, root, block_hashes(tokens, BLOCK, root))
    images = [MultiModalFeature("a", BLOCK + 3, 5)]
    keys = feature_keys(images, BLOCK)
    assert made.prefix(tokens, "salt", features=images).hashes == block_hashes(tokens, BLOCK, root, keys)
    assert len(made.prefix(tokens).hashes) == 3
    assert not set(made.prefix(tokens).hashes) & set(made.prefix(tokens, "salt").hashes)


def test_idle_engines_take_turns() -> None:
    made = router(3)
    chosen = []
    for index in range(6):
        prefix = prompt(made, 1000 * index)
        chosen.append(made.choose(prefix, range(3)))
        made.enter(index, chosen[-1], prefix)
        made.begin(index)
        made.leave(index)
    assert chosen == [0, 1, 2, 0, 1, 2]


def test_a_prefix_stays_until_its_engine_has_more_to_do_than_computing_it_again() -> None:
    made = router()
    prefix = prompt(made, 0)
    made.enter(0, 1, prefix)
    made.leave(0)
    assert made.choose(prefix, range(2)) == 1
    made.enter(1, 1, prompt(made, 1000, 300))  # less than the 288 tokens that the cache saves, and the 32 left
    assert made.cost(1, prefix) == 32 + 300 and made.cost(0, prefix) == 320
    assert made.choose(prefix, range(2)) == 0
    made.begin(1)  # its prompt is computed: what is left is a row of each step
    assert made.cost(1, prefix) == 32 + RUNNING_COST + 300 / 64
    assert made.choose(prefix, range(2)) == 1
    made.leave(1)
    assert made.cost(1, prefix) == 32


def test_a_prefix_stays_for_longer_while_all_engines_are_busy_with_prompts() -> None:
    made = router()
    prefix = prompt(made, 0)
    made.enter(0, 1, prefix)
    made.leave(0)
    made.enter(1, 1, prompt(made, 1000, 900))
    assert made.choose(prefix, range(2)) == 0  # which has the time
    made.enter(2, 0, prompt(made, 3000))
    assert made.choose(prefix, range(2)) == 1
    made.begin(2)
    assert made.choose(prefix, range(2)) == 0


def test_outputs_are_cached_but_for_the_token_that_was_never_computed() -> None:
    made = router()
    tokens = np.arange(BLOCK * 4 + 1, dtype=np.int32)
    made.enter(0, 0, made.prefix(tokens[:40]))
    made.leave(0, tokens[: BLOCK * 4])
    assert made.cost(0, made.prefix(tokens)) == BLOCK + 1
    made.enter(1, 0, made.prefix(tokens[:10]))  # shorter than a block
    made.leave(1, tokens)
    assert made.cost(0, made.prefix(tokens)) == 1


def test_a_request_that_has_begun_is_no_prompt_to_compute_for_ever_where_it_moves() -> None:
    made = router()
    made.enter(0, 0, prompt(made, 0))
    made.begin(0)
    made.enter(1, 0, prompt(made, 1000))
    assert made.move(0, [1]) == made.move(1, [1]) == 1
    assert made.cost(1, prompt(made, 2000)) == 320 + RUNNING_COST + 320 / 64 + 320
    made.leave(0)
    made.leave(1)
    assert made.cost(1, prompt(made, 2000)) == made.cost(0, prompt(made, 2000)) == 320


def test_only_the_beginning_of_a_very_long_prompt_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.engine.routing.MAX_BLOCKS", 3)
    made = router()
    tokens = np.arange(BLOCK * 5, dtype=np.int32)
    made.enter(0, 0, made.prefix(tokens[:BLOCK]))
    made.leave(0, tokens)
    assert made.cost(0, made.prefix(tokens)) == BLOCK * 2


def test_at_least_one_token_is_computed() -> None:
    made = router()
    prefix = prompt(made, 0, BLOCK * 2)
    made.enter(0, 0, prefix)
    made.leave(0)
    assert made.cost(0, prefix) == BLOCK  # as the engine does, which reuses whole blocks


def test_a_request_of_a_lost_engine_moves_with_its_work() -> None:
    made = router(3)
    prefix = prompt(made, 0)
    made.enter(0, 0, prefix)
    made.cache_lost(0)
    assert made.move(0, [1, 2]) == 1
    assert made.engine_of(0) == 1
    assert made.cost(0, prefix) == 320
    assert made.cost(1, prefix) == 32 + 320
    made.leave(0)
    assert made.engine_of(0) is None and made.cost(1, prefix) == 32


def test_without_prefix_caching_only_load_counts() -> None:
    made = Router(2, uses_prefixes=False)
    for engine in range(2):
        made.engine_ready(engine, 10, BLOCK)
    prefix = prompt(made, 0)
    assert prefix == Prefix(320)
    made.enter(0, 0, prefix)
    made.leave(0, np.arange(400, dtype=np.int32))
    assert made.cost(0, prefix) == made.cost(1, prefix) == 320


def test_the_least_recently_used_blocks_are_forgotten_last_blocks_first() -> None:
    index = PrefixIndex(4)
    one, other = [b"a", b"b", b"c"], [b"x", b"y"]
    index.use(one)
    index.use(other)
    assert len(index) == 4
    assert index.longest(one) == 2 and index.longest(other) == 2
    index.use([b"a"])
    index.use([b"n", b"m"])
    assert index.longest(one) == 1 and index.longest(other) == 1
    index.clear()
    assert index.longest(one) == 0


def test_a_model_with_states_goes_on_from_snapshots_alone() -> None:
    """They are kept every 256 tokens, before the end of a prompt, and every 64 tokens of an output."""
    made = Router(1)
    made.engine_ready(0, 100, BLOCK, Snapshots(BLOCK))
    tokens = np.arange(1000, dtype=np.int32)

    def cached(count: int) -> int:
        return count - round(made.cost(0, made.prefix(tokens[:count])))

    made.enter(0, 0, made.prefix(tokens[:400]))
    made.leave(0)
    assert [cached(count) for count in (256, 257, 384, 385, 1000)] == [0, 256, 256, 384, 384]
    made.enter(1, 0, made.prefix(tokens[:400]))
    made.leave(1, tokens[:500])
    assert cached(1000) == 448, "the last one of the output"
    made.enter(2, 0, made.prefix(tokens[:400]))
    made.leave(2, tokens[:700])
    assert cached(1000) == 640 and cached(600) == 512, "which replaces those that are not due anyway"
    made.cache_lost(0)
    assert cached(1000) == 0


@pytest.mark.parametrize("seed", range(8))
def test_what_is_known_of_a_cache_with_states_is_what_the_engine_finds(seed: int) -> None:
    """Turns of chats, with all or a part of the last answer, and other continuations of a prompt."""
    snapshots = Snapshots(4, every=16, every_of_output=8, margin=3, output_tokens=16)
    engine = Engine.create(depth=1, groups=(GroupShape(256, 4), GroupShape(256, 4, window=2, snapshots=snapshots)))
    made = Router(1)
    made.engine_ready(0, 256, 4, snapshots)
    rng = np.random.default_rng(seed)
    chats = prompts(2, 23, seed)
    num_hits = 0
    for index in range(8):
        turn = chats[index % 2]
        tokens = np.array(turn, np.int32)
        prefix = made.prefix(tokens)
        known = len(turn) - round(made.cost(0, prefix))
        num_hits += known > 0
        made.enter(index, 0, prefix)
        engine.scheduler.add_request(make_request(index, turn, int(rng.integers(1, 30))))
        engine.run()
        assert engine.cached[index] == known
        output = engine.outputs[index]
        made.leave(index, np.concatenate((tokens, np.array(output, np.int32))))
        shown = output[: int(rng.integers(len(output) + 1)) if rng.integers(2) else len(output)]
        following = turn + shown + prompts(1, int(rng.integers(1, 9)), index)[0]
        chats[index % 2] = following[:40] if len(following) >= MAX_LEN else following
    assert num_hits >= 5
