"""Ranks that meet: threads as ranks, eager and in captured programs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import ops
from executor.graphs import Program
from ops.dispatch import Spec
from tests import thread_ranks
from tests.thread_ranks import ThreadRank, on_ranks


@pytest.mark.parametrize("size", [2, 3])
def test_sums_and_columns(size: int) -> None:
    given = [torch.randn(4, 3, generator=torch.Generator().manual_seed(rank)) for rank in range(size)]
    widths = [1, 3, 2][:size]

    def run(rank: ThreadRank) -> tuple[torch.Tensor, torch.Tensor]:
        x = given[rank.rank]
        total = ops.all_reduce(x, rank)
        return total, ops.all_gather(x[:, : widths[rank.rank]], rank, tuple(widths))

    expected = given[0]
    for x in given[1:]:
        expected = expected + x  # in the order of the ranks
    columns = torch.cat([x[:, :width] for x, width in zip(given, widths, strict=True)], dim=1)
    for total, gathered in on_ranks(size, run):
        assert torch.equal(total, expected)
        assert torch.equal(gathered, columns)


def test_meetings_are_nodes_of_programs() -> None:
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 8)

    def forward(x: Any, packed: ops.Weight, rank: ops.Communicator) -> Any:
        y = ops.all_reduce(ops.linear(x, packed), rank)
        return ops.all_gather(ops.activation(y, "relu"), rank, (8,) * rank.size)

    def capture(rank: ops.Communicator, packed: ops.Weight) -> Program:
        program = Program("cpu")
        value: Any = program.input("x", Spec("tokens", 8, torch.float32))
        program.finish(forward(value, packed, rank))
        return program

    def run(rank: ThreadRank) -> tuple[Program, torch.Tensor, torch.Tensor]:
        packed = ops.pack_linear(weight * (rank.rank + 1))
        program = capture(rank, packed)
        return program, program.replay({"x": x})[0].clone(), forward(x, packed, rank)

    for program, replayed, eager in on_ranks(2, run):
        assert [node.name for node in program.nodes] == ["linear", "all_reduce", "activation", "all_gather"]
        assert replayed.shape == (5, 16) and torch.equal(replayed, eager)
        torch.testing.assert_close(replayed[:, :8], torch.relu(3 * x @ weight.T))
    # Of one rank there is nothing to record.
    alone = capture(ops.SingleRank(), ops.pack_linear(weight))
    assert [node.name for node in alone.nodes] == ["linear", "activation"]


def test_a_rank_takes_only_ids_of_its_own() -> None:
    ids = torch.tensor([3, 0, 5, 4], dtype=torch.int32)
    local, is_here = ops.shard_ids(ids, 3, 2)
    assert local.dtype == torch.int32 and local.tolist() == [0, 0, 0, 1]
    assert is_here.tolist() == [True, False, False, True]
    rows = torch.full((4, 2), float("inf"))
    assert ops.keep_rows(rows, is_here).tolist() == [[float("inf")] * 2, [0, 0], [0, 0], [float("inf")] * 2]


def test_a_rank_that_is_alone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="rank 1 of 2 is not connected to the others"):
        ops.all_reduce(torch.zeros(1, 1), ops.NotConnected(1, 2))
    with pytest.raises(RuntimeError, match="rank 1 of 2 is not connected to the others"):
        ops.all_gather(torch.zeros(1, 1), ops.NotConnected(1, 2), (1, 1))
    monkeypatch.setattr(thread_ranks, "MEETING_TIMEOUT", 0.01)
    with pytest.raises(threading.BrokenBarrierError):
        ThreadRank.group(2)[0].all_reduce(torch.zeros(1, 1))
