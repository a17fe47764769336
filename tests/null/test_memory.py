"""How the KV cache is sized."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from engine_core.cache_shape import CacheShape, GroupShape
from engine_core.config import CacheConfig, EngineConfig, ExecutorConfig, ModelConfig, SchedulerConfig
from engine_core.memory import different_kernels, format_bytes, plan_kv_cache
from executor.messages import KVCacheGroupSpec, WorkerReady

MODEL_LEN = 1000
SEQS = 4
BUDGET = 16


def ready(*groups: KVCacheGroupSpec, kv_bytes: int = 0, rank: int = 0) -> WorkerReady:
    return WorkerReady(
        rank=rank,
        free_bytes=kv_bytes,
        total_bytes=kv_bytes,
        weight_bytes=0,
        default_kv_bytes=kv_bytes,
        kv_cache_groups=groups,
        max_model_len=MODEL_LEN,
        vocab_size=10,
    )


def group(bytes_per_block: int, window: int | None = None, block_size: int = 4) -> KVCacheGroupSpec:
    return KVCacheGroupSpec(
        kind="full" if window is None else "sliding_window",
        block_size=block_size,
        bytes_per_block=bytes_per_block,
        layers=(0,),
        sliding_window=window,
    )


STATES = msgspec.structs.replace(group(5, window=2), layout="states")
"""States, one per block."""


def plan(*workers: WorkerReady, max_model_len: int | None = -1, **cache: Any) -> tuple[CacheShape, int] | str:
    num_replicas = cache.pop("num_replicas", 1)
    config = EngineConfig(
        num_replicas=num_replicas,
        scheduler=SchedulerConfig(max_num_seqs=SEQS, max_num_batched_tokens=BUDGET),
        cache=CacheConfig(**cache),
        executor=ExecutorConfig(model=ModelConfig(max_model_len=max_model_len)),
    )
    return plan_kv_cache(list(workers), config)


def planned(*workers: WorkerReady, **options: Any) -> tuple[CacheShape, int]:
    result = plan(*workers, **options)
    assert not isinstance(result, str)
    return result


def test_ranks_with_one_memory_get_what_their_blocks_take() -> None:
    shares = [
        msgspec.structs.replace(ready(group(size), kv_bytes=100, rank=rank), shares_memory=True)
        for rank, size in enumerate([2, 1])
    ]
    assert planned(*shares)[0] == planned(ready(group(3), kv_bytes=100))[0]
    assert planned(*shares, kv_cache_memory=30)[0] == CacheShape((GroupShape(10, 4),))
    alone = [msgspec.structs.replace(share, shares_memory=False) for share in shares]
    assert planned(*alone, kv_cache_memory=30)[0] == CacheShape((GroupShape(15, 4),))


def test_machines_have_memories_of_their_own() -> None:
    machines = [
        msgspec.structs.replace(ready(group(1), kv_bytes=100, rank=rank), shares_memory=True, node_rank=node)
        for rank, node in enumerate([0, 0, 1])
    ]
    assert planned(*machines)[0] == CacheShape((GroupShape(50, 4),)), "the first machine has two ranks"
    other = msgspec.structs.replace(machines[2], kernels="avx2 kernels and torch 2")
    message = different_kernels([*machines[:2], other])
    assert message is not None and message.startswith("machine 1 would compute with avx2 kernels and torch 2 and ")


def test_one_group_takes_all() -> None:
    assert planned(ready(group(3), kv_bytes=100)) == (CacheShape((GroupShape(33, 4),)), 132)
    assert planned(ready(group(3), kv_bytes=10_000)) == (CacheShape((GroupShape(3333, 4),)), MODEL_LEN)


def test_engines_on_a_cpu_share_what_is_free() -> None:
    on_cpu = msgspec.structs.replace(ready(group(3), kv_bytes=100), device="cpu")
    assert planned(on_cpu, num_replicas=2)[0].groups[0].num_blocks == 50 // 3
    assert planned(on_cpu, num_replicas=2, gpu_memory_utilization=0.5)[0].groups[0].num_blocks == 25 // 3
    assert planned(on_cpu, num_replicas=2, kv_cache_memory=90)[0].groups[0].num_blocks == 30  # is of each
    on_gpu = msgspec.structs.replace(on_cpu, device="cuda")
    assert planned(on_gpu, num_replicas=2)[0].groups[0].num_blocks == 33


def test_what_a_window_saves_goes_to_the_others() -> None:
    shape, length = planned(ready(group(2), group(3, window=8), kv_bytes=1000))
    full, window = shape.groups
    most = GroupShape(0, 4, 8).max_live_blocks(MODEL_LEN, BUDGET)
    assert window == GroupShape(SEQS * most, 4, 8)
    assert full == GroupShape((1000 - 3 * window.num_blocks) // 2, 4) and length == MODEL_LEN


def test_a_small_cache_holds_as_many_tokens_in_each_group() -> None:
    assert planned(ready(group(2), group(3, window=8), kv_bytes=27)) == (
        CacheShape((GroupShape(5, 4), GroupShape(5, 4, 8))),
        20,
    )


def test_windows_alone_take_all_and_bound_no_sequence() -> None:
    shape, length = planned(ready(group(2, window=8), group(3, window=20), kv_bytes=1000))
    assert shape.groups == (GroupShape(200, 4, 8), GroupShape(200, 4, 20)) and length == MODEL_LEN
    shape, length = planned(ready(group(1, window=8), kv_bytes=7))
    assert shape.groups == (GroupShape(7, 4, 8),) and length == MODEL_LEN
    shape, length = planned(ready(group(1, window=8), kv_bytes=6))
    assert shape.groups == (GroupShape(6, 4, 8),) and length == 24


@pytest.mark.parametrize("kv_bytes", [3_000, 30_000, 10**9])
def test_states_take_at_most_half(kv_bytes: int) -> None:
    """A few sequences' states would take all of a small cache."""
    states = msgspec.structs.replace(STATES, bytes_per_block=300)
    shape, length = planned(ready(group(2), states, kv_bytes=kv_bytes))
    full, own = shape.groups
    most = own.max_live_blocks(MODEL_LEN, BUDGET)
    assert own.num_blocks % most == 0 and most <= own.num_blocks <= SEQS * most
    assert own.num_blocks == SEQS * most or 300 * own.num_blocks <= max(2 * full.num_blocks, 300 * most)
    assert 2 * full.num_blocks + 300 * own.num_blocks <= kv_bytes
    assert length == MODEL_LEN


def test_groups_may_have_blocks_of_different_sizes() -> None:
    shape, length = planned(ready(group(2), group(3, block_size=6), kv_bytes=500))
    assert shape.groups == (GroupShape(123, 4), GroupShape(82, 6)) and length == 492
    assert shape.num_tokens == 492


def test_the_rank_with_the_least_room_decides() -> None:
    shape, _ = planned(ready(group(3), kv_bytes=100), ready(group(5), kv_bytes=100))
    assert shape.groups == (GroupShape(20, 4),)


def test_all_ranks_must_have_the_same_groups() -> None:
    first = ready(group(2), group(3, window=8), kv_bytes=1000)
    same = ready(group(5), msgspec.structs.replace(group(1, window=8), layers=(4, 5)), kv_bytes=1000, rank=1)
    planned(first, same)
    for other in (
        (group(2),),
        (group(3, window=8), group(2)),
        (group(2), group(3, window=9)),
        (group(2, block_size=8), group(3, window=8)),
        (group(2), msgspec.structs.replace(group(3, window=8), dtype="float16")),
        (),
    ):
        problem = plan(first, same, ready(*other, kv_bytes=1000, rank=2))
        assert isinstance(problem, str) and problem.startswith("worker 2 has other KV cache groups than worker 0: ")


def test_a_model_without_a_cache_needs_no_room() -> None:
    assert planned(ready()) == (CacheShape(()), MODEL_LEN)
    assert planned(ready(), num_gpu_blocks_override=7, max_model_len=None) == (CacheShape(()), MODEL_LEN)
    assert CacheShape(()).num_tokens == 0


def test_a_number_of_blocks_that_is_given_is_that_of_a_group_without_a_window() -> None:
    shape, _ = planned(ready(group(1), group(1, window=8)), num_gpu_blocks_override=100)
    assert shape.groups[0] == GroupShape(100, 4) and shape.groups[1].num_blocks == 28


@pytest.mark.parametrize(
    "groups", [(group(2),), (group(2), group(3, window=8)), (group(2, window=300),), (group(2), STATES)]
)
def test_the_memory_that_an_error_asks_for_is_enough_and_no_less_is(groups: tuple[KVCacheGroupSpec, ...]) -> None:
    problem = plan(ready(*groups, kv_bytes=50), max_model_len=None)
    assert isinstance(problem, str) and "--max-model-len 1000 does not fit the KV cache" in problem
    needed = int(problem.split("it needs ")[1].split()[0])
    assert planned(ready(*groups, kv_bytes=needed), max_model_len=None)[1] == MODEL_LEN
    assert isinstance(plan(ready(*groups, kv_bytes=needed - 1), max_model_len=None), str)
    longest = int(problem.split("use --max-model-len ")[1].split()[0])
    assert planned(ready(*groups, kv_bytes=50), max_model_len=longest)[1] == longest


@pytest.mark.parametrize("count", [0, 1, 1023, 1025, 1536, 1_234_567, 99_999_999, 5_368_709_121, 1 << 45])
def test_sizes_are_rounded_up(count: int) -> None:
    number, unit = format_bytes(count).split()
    told = float(number) * 1024 ** ["B", "KiB", "MiB", "GiB"].index(unit)
    assert count <= told <= count * 1.002


def test_errors() -> None:
    assert plan(ready(group(3), group(4, window=8), kv_bytes=6)) == (
        "no memory for a KV cache: 6 B are left and one block takes 7 B; free memory or set --kv-cache-memory"
    )
    assert isinstance(plan(ready(group(1), kv_bytes=-5)), str)
    assert isinstance(plan(ready(group(1), kv_bytes=500), max_model_len=MODEL_LEN + 1), str)
