"""Block tables and prefix hits of several KV cache groups, against their definition."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_core.cache_shape import CacheShape, GroupShape
from engine_core.kv_cache_manager import KVCacheManager
from engine_core.messages import EngineCoreRequest, LoRARequest, ResolvedParams
from engine_core.request import Request
from engine_core.single_type_kv_cache_manager import NEVER

STEP = 6
"""Tokens in a step."""


def make_request(index: int, tokens: list[int], **fields: object) -> Request:
    return Request(
        EngineCoreRequest(
            request_id=str(index),
            index=index,
            prompt_token_ids=np.array(tokens, np.int32).tobytes(),
            sampling_params=ResolvedParams(),
            **fields,  # type: ignore[arg-type]
        )
    )


def manager(*groups: GroupShape, caching: bool = True) -> KVCacheManager:
    return KVCacheManager(CacheShape(groups), STEP, enable_prefix_caching=caching)


@dataclass
class Run:
    """A request that runs through a manager as the scheduler does it."""

    kv: KVCacheManager
    request: Request
    num_computed: int = 0
    free_at: int = 0

    @classmethod
    def start(cls, kv: KVCacheManager, request: Request, count: int = STEP) -> Run | None:
        hit = kv.find_cached_prefix(request)
        if not kv.can_fit(hit, len(request.token_ids)):
            return None
        run = cls(kv, request, hit.num_tokens)
        kv.start(request, hit, hit.num_tokens)
        assert run.advance(count)
        return run

    @property
    def is_done(self) -> bool:
        return self.num_computed == len(self.request.token_ids)

    def advance(self, count: int = STEP) -> bool:
        """A step of so many tokens. False: there are no blocks for it."""
        if self.num_computed >= self.free_at:
            self.free_at = self.kv.free_unseen(self.request, self.num_computed)
        end = min(self.num_computed + count, len(self.request.token_ids))
        capacity = self.kv.grow(self.request, end, [[] for _ in self.kv.managers])
        if capacity is None:
            return False
        assert capacity >= end
        self.check_view(end)
        self.num_computed = end
        self.kv.publish(self.request, self.request.token_ids, end)
        return True

    def check_view(self, end: int) -> None:
        """What the tokens of a step see and write has blocks, and no more than that has."""
        for table, own in zip(self.request.block_tables, self.kv.managers, strict=True):
            window, size = own.shape.window, own.block_size
            first = 0 if window is None else max(0, self.num_computed + 1 - window) // size
            assert table.first == first and table.num_blocks >= -(-end // size)
            assert len(table.block_ids) <= own.shape.max_live_blocks(len(self.request.token_ids), STEP)

    def finish(self) -> None:
        while not self.is_done:
            assert self.advance()
        self.kv.release(self.request)


def ran(kv: KVCacheManager, tokens: list[int], **fields: object) -> int:
    """Runs a request to its end. Returns the tokens that were cached."""
    run = Run.start(kv, make_request(0, tokens, **fields))
    assert run is not None
    cached = run.kv.num_hit_tokens
    run.finish()
    return cached


def test_a_long_prompt_goes_through_a_window_with_few_blocks() -> None:
    kv = manager(GroupShape(num_blocks=5, block_size=4, window=8))
    run = Run.start(kv, make_request(0, list(range(1000))))
    assert run is not None
    run.finish()
    assert kv.num_free == 5


def test_what_fits_one_group_only_is_not_admitted() -> None:
    kv = manager(GroupShape(num_blocks=10, block_size=4), GroupShape(num_blocks=5, block_size=4, window=8))
    assert Run.start(kv, make_request(0, list(range(41)))) is None
    assert Run.start(kv, make_request(1, list(range(40)))) is not None


def test_a_hit_is_the_longest_that_all_groups_have() -> None:
    kv = manager(GroupShape(num_blocks=20, block_size=4), GroupShape(num_blocks=6, block_size=4, window=8))
    prompt = list(range(40))
    run = Run.start(kv, make_request(0, prompt))
    assert run is not None
    run.finish()
    full, window = kv.managers
    hashes = run.request.block_hashes[4]
    assert [full.pool.lookup(value) is not None for value in hashes] == [True] * 10
    held = [window.pool.lookup(value) is not None for value in hashes]
    assert held == [False] * 4 + [True] * 6
    # A prompt that goes on after 36 tokens sees the last seven before: two blocks of the window, and all of the rest.
    hit = kv.find_cached_prefix(make_request(1, prompt[:37]))
    assert hit.num_tokens == 36
    assert [(table.first, len(table.block_ids)) for table in hit.tables] == [(0, 9), (7, 2)]
    # After 20 tokens, the window would need a block that is gone.
    assert kv.find_cached_prefix(make_request(2, prompt[:21])).num_tokens == 0
    assert kv.find_cached_prefix(make_request(3, prompt[:25])).num_tokens == 24
    full.pool.forget(run_lookup(full, hashes[7]))
    assert kv.find_cached_prefix(make_request(4, prompt)).num_tokens == 28


def run_lookup(own: object, block_hash: bytes) -> int:
    block_id = own.pool.lookup(block_hash)  # type: ignore[attr-defined]
    assert isinstance(block_id, int)
    return block_id


def test_groups_with_blocks_of_different_sizes_agree_on_whole_blocks() -> None:
    kv = manager(GroupShape(num_blocks=20, block_size=6), GroupShape(num_blocks=40, block_size=4, window=8))
    prompt = list(range(40))
    assert ran(kv, prompt) == 0
    assert kv.find_cached_prefix(make_request(1, prompt)).num_tokens == 36
    assert kv.find_cached_prefix(make_request(1, prompt[:36])).num_tokens == 24


def test_blocks_that_left_the_window_before_their_tokens_were_known_are_not_published() -> None:
    kv = manager(GroupShape(num_blocks=8, block_size=2, window=1))
    request = make_request(0, list(range(20)))
    hit = kv.find_cached_prefix(request)
    kv.start(request, hit, 4)
    kv.free_unseen(request, 4)
    kv.grow(request, 8, [[]])
    kv.publish(request, request.token_ids, 8)
    assert [kv.managers[0].pool.lookup(value) is not None for value in request.block_hashes[2][:4]] == [0, 0, 1, 1]
    kv.check_integrity([request])


def test_content_that_is_not_to_be_trusted_is_forgotten_behind_the_window_too() -> None:
    kv = manager(GroupShape(num_blocks=30, block_size=4), GroupShape(num_blocks=30, block_size=4, window=8))
    run = Run.start(kv, make_request(0, list(range(60))))
    assert run is not None
    while not run.is_done:
        assert run.advance()
    assert run.request.block_tables[1].first > 0
    kv.discard(run.request)
    kv.release(run.request)
    assert kv.num_free == kv.num_blocks
    assert not any(own.pool.lookup(value) for own in kv.managers for value in run.request.block_hashes[4])


def test_adapters_are_told_apart_by_their_content() -> None:
    def adapter(content: str) -> LoRARequest:
        return LoRARequest(name="same", lora_id=1, path="same", content_hash=content)

    kv = manager(GroupShape(num_blocks=30, block_size=4))
    prompt = list(range(20))
    ran(kv, prompt, lora_request=adapter("a"))
    assert kv.find_cached_prefix(make_request(1, prompt, lora_request=adapter("b"))).num_tokens == 0
    assert kv.find_cached_prefix(make_request(1, prompt)).num_tokens == 0
    assert kv.find_cached_prefix(make_request(1, prompt, lora_request=adapter("a"))).num_tokens == 16


def test_a_model_without_a_cache_has_no_groups() -> None:
    kv = manager()
    assert not kv.enable_prefix_caching and not kv.has_windows
    assert (kv.num_blocks, kv.num_free, kv.usage) == (0, 0, 0.0)
    run = Run.start(kv, make_request(0, list(range(20))))
    assert run is not None and kv.grow(run.request, 20, []) == NEVER
    run.finish()
    kv.check_integrity([run.request])


def test_usage_is_that_of_the_fullest_group() -> None:
    kv = manager(GroupShape(num_blocks=20, block_size=4), GroupShape(num_blocks=5, block_size=4, window=8))
    run = Run.start(kv, make_request(0, list(range(40))))
    assert run is not None and kv.usage == 2 / 5
    while not run.is_done:
        assert run.advance()
    assert kv.usage == max(10 / 20, len(run.request.block_tables[1].block_ids) / 5)


@dataclass
class Model:
    """What a manager must find, by definition: contents of blocks instead of hashes."""

    kv: KVCacheManager
    runs: list[Run] = field(default_factory=list)

    def longest_hit(self, request: Request) -> int:
        tokens = tuple(request.token_ids.tolist())
        alignment = self.kv.shape.alignment
        for length in range((len(tokens) - 1) // alignment * alignment, 0, -alignment):
            if all(self.has(own, request, tokens, length) for own in self.kv.managers):
                return length
        return 0

    def has(self, own: object, request: Request, tokens: tuple[int, ...], length: int) -> bool:
        shape, pool = own.shape, own.pool  # type: ignore[attr-defined]
        first = 0 if shape.window is None else max(0, min(length + 1 - shape.window, length - 1))
        hashes = self.kv.hashes(request, request.token_ids, len(tokens), shape.block_size)
        return all(pool.lookup(hashes[position // shape.block_size]) is not None for position in range(first, length))


GROUPS = st.lists(
    st.tuples(st.sampled_from([None, None, 1, 2, 5, 9]), st.sampled_from([1, 2, 4]), st.integers(0, 30)),
    min_size=0,
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(groups=GROUPS, data=st.data())
def test_any_order_of_operations_keeps_the_books(
    groups: list[tuple[int | None, int, int]], data: st.DataObject
) -> None:
    draw = data.draw
    shapes = []
    for window, size, more in groups:
        least = GroupShape(0, size, window).max_live_blocks(40, STEP)
        shapes.append(GroupShape(least + more, size, window))
    kv = manager(*shapes, caching=draw(st.booleans()))
    model = Model(kv)
    for index in range(draw(st.integers(1, 25))):
        kind = draw(st.sampled_from(["start", "advance", "advance", "advance", "release", "discard", "reset"]))
        running = [run for run in model.runs if run.request.block_tables or not shapes]
        if kind == "start":
            shared = draw(st.integers(0, 30))
            request = make_request(index, list(range(shared)) + [100 + index] * draw(st.integers(1, 40 - shared)))
            if kv.enable_prefix_caching:
                assert kv.find_cached_prefix(request).num_tokens == model.longest_hit(request)
            run = Run.start(kv, request, draw(st.integers(1, STEP)))
            assert run is not None or running, "what fits the cache runs at least alone"
            model.runs += [run] if run else []
        elif kind == "reset":
            kv.reset_prefix_cache()
        elif running:
            run = draw(st.sampled_from(running))
            if kind == "advance":
                if not run.is_done:
                    assert run.advance(draw(st.integers(1, STEP))) or len(running) > 1
            else:
                model.runs.remove(run)
                if kind == "discard":
                    kv.discard(run.request)
                kv.release(run.request)
        kv.check_integrity([run.request for run in model.runs])
    for run in model.runs:
        kv.release(run.request)
    assert kv.num_free == kv.num_blocks


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 8, 31])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_the_most_blocks_at_a_time_is_exact(window: int, size: int) -> None:
    shape = GroupShape(0, size, window)
    most = 0
    for begin in range(100):
        for count in range(1, STEP + 1):
            first = max(0, begin + 1 - window) // size
            most = max(most, -(-(begin + count) // size) - first)
    assert shape.max_live_blocks(1000, STEP) == most
