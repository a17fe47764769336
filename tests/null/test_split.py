"""Which rank holds what: heads, columns and cores."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine_core import launch
from engine_core.config import EngineConfig, ExecutorConfig, ParallelConfig
from executor.parallel import (
    Share,
    about_ranks,
    split_columns,
    split_cores,
    split_heads,
    split_layers,
    thread_places,
)
from executor.parallel.cores import format_cores, numa_nodes, parse_cores

SHAPES = [(9, 3), (4, 2), (8, 1), (6, 2), (12, 12), (16, 8), (32, 8), (7, 7)]


def covers(shares: list[Share], size: int) -> bool:
    """Whether shares that follow each other are all of a dimension."""
    ends = [0, *(share.end for share in shares)]
    return all(share.start == end for share, end in zip(shares, ends, strict=False)) and ends[-1] == size


@pytest.mark.parametrize("num_ranks", range(1, 9))
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), SHAPES)
def test_every_query_head_is_with_its_kv_head(num_heads: int, num_kv_heads: int, num_ranks: int) -> None:
    group = num_heads // num_kv_heads
    try:
        shares = split_heads(num_heads, num_kv_heads, num_ranks)
    except ValueError as error:
        most = int(str(error).split("size ")[1].split()[0])
        assert most < num_ranks and len(split_heads(num_heads, num_kv_heads, most)) == most
        return
    assert len(shares) == num_ranks and covers([share.q for share in shares], num_heads)
    for share in shares:
        heads = {head // group for head in range(share.q.start, share.q.end)}
        assert share.q.size and heads == set(range(share.kv.start, share.kv.end))
    if num_ranks <= num_kv_heads:
        assert covers([share.kv for share in shares], num_kv_heads)
    counts = [share.kv.size for share in shares]
    assert max(counts) == -(-num_kv_heads // num_ranks) and max(counts) - min(counts) <= 1


def test_heads_of_small_models() -> None:
    assert [share.q.size for share in split_heads(9, 3, 2)] == [6, 3]
    assert [share.q.size for share in split_heads(9, 3, 4)] == [2, 1, 3, 3]
    with pytest.raises(ValueError, match=r"3 for each of 3 KV heads, are too few: use .* 9 or less"):
        split_heads(9, 3, 10)
    with pytest.raises(ValueError, match="cannot be divided"):
        split_heads(9, 2, 2)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=9), st.integers(1, 4), st.integers(0, 40))
def test_stages_are_as_equal_as_they_can_be(sizes: list[int], num_stages: int, last: int) -> None:
    if len(sizes) < num_stages:
        with pytest.raises(ValueError, match=f"use --pipeline-parallel-size {len(sizes)} or less"):
            split_layers(sizes, num_stages, last)
        return

    def largest(ends: Sequence[int]) -> int:
        parts = [sum(sizes[begin:end]) for begin, end in pairwise([0, *ends, len(sizes)])]
        return max([*parts[:-1], parts[-1] + last])

    shares = split_layers(sizes, num_stages, last)
    assert len(shares) == num_stages and covers(list(shares), len(sizes)) and all(share.size for share in shares)
    best = min(largest(ends) for ends in combinations(range(1, len(sizes)), num_stages - 1))
    assert largest([share.end for share in shares[:-1]]) == best


def test_the_output_layer_counts() -> None:
    assert [share.size for share in split_layers([7] * 30, 2, 56)] == [19, 11]


@pytest.mark.parametrize("size", [32, 96, 100, 576, 49152, 151936])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_columns_are_whole_blocks(size: int, num_ranks: int) -> None:
    if -(-size // 32) < num_ranks:
        with pytest.raises(ValueError, match=r"a layer has .*: use --tensor-parallel-size \d or less"):
            split_columns(size, num_ranks, "a layer")
        return
    shares = split_columns(size, num_ranks, "a layer")
    assert len(shares) == num_ranks and covers(list(shares), size)
    assert all(share.start % 32 == 0 and share.size for share in shares)
    sizes = [share.size for share in shares]
    assert max(sizes) - min(sizes) < 64


def test_ranks_have_cores_of_their_own(tmp_path: Path) -> None:
    assert parse_cores("0-2,8\n") == {0, 1, 2, 8}
    assert format_cores({8, 2, 0, 1}) == "0-2,8" and format_cores(()) == ""
    for node, cores in ((0, "0,2,4,6"), (1, "1,3,5,7"), (2, "")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cores)
    nodes = numa_nodes(tmp_path)
    assert list(nodes) == [0, 1]
    assert split_cores(2, range(8), nodes, tmp_path) == [(0, 2, 4, 6), (1, 3, 5, 7)]
    assert split_cores(3, range(7), nodes, tmp_path) == [(0, 2, 4), (6, 1), (3, 5)]
    assert split_cores(3, [5, 4], {}, tmp_path) == [(4,), (5,), (4,)]
    two = {0: frozenset(range(0, 8, 2)), 1: frozenset(range(1, 8, 2))}
    expected = {"OMP_PLACES": "{0},{2},{4},{6},{1},{3},{5}", "OMP_PROC_BIND": "spread"}
    assert thread_places(range(7), two, tmp_path) == expected
    assert thread_places((0, 2), two, tmp_path) == {} == thread_places(range(8), {}, tmp_path), "one node"
    assert numa_nodes(tmp_path / "none") == {}
    assert about_ranks([(0, 2, 4, 6), (1, 3, 5, 7)], nodes) == "ranks run on cores 0,2,4,6 | 1,3,5,7"
    assert about_ranks([(0,), (1,)], {}).endswith("on CPUs of one NUMA node, they are no faster than threads")
    assert "they share some" in about_ranks([(4,), (5,), (4,)], nodes)


def test_threads_of_a_core_stay_together(tmp_path: Path) -> None:
    for cpu in range(8):  # as Linux numbers them: first one thread of each core
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "core_id").write_text(f"{cpu % 4}\n")
    assert split_cores(2, range(8), {}, tmp_path) == [(0, 4, 1, 5), (2, 6, 3, 7)]
    assert split_cores(4, range(8), {}, tmp_path)[3] == (3, 7)


def test_threads_have_cores_of_their_own_unless_ranks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "thread_places", lambda: {"OMP_PLACES": "{0},{1}"})
    for variable in launch._OWN_CORES:
        monkeypatch.delenv(variable, raising=False)
    alone = EngineConfig()
    assert launch._environment(alone)["OMP_PLACES"] == "{0},{1}"
    ranks = ExecutorConfig(parallel=ParallelConfig(tensor_parallel_size=2))
    inline = ExecutorConfig(distributed_executor_backend="inline")
    for shares in (EngineConfig(executor=ranks), EngineConfig(executor=inline), EngineConfig(num_replicas=2)):
        assert launch._environment(shares) == launch._ENVIRONMENT
    monkeypatch.setenv("GOMP_CPU_AFFINITY", "0 1")
    assert launch._environment(alone) == launch._ENVIRONMENT
