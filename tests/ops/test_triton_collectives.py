"""What kernels do with the data of other ranks, interpreted: ranks take turns, and something moves their data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import ops
from executor.graphs import Program
from ops import dispatch
from ops.dispatch import Spec
from tests.ops.cpu import randn
from tests.triton_interpreter import ORDERS, Order, grid_order

collectives: Any = pytest.importorskip("ops.triton.collectives")
launch: Any = pytest.importorskip("ops.triton.launch")
op_set: Any = pytest.importorskip("ops.triton.op_set")

DTYPES = [torch.bfloat16, torch.float32]


class Turn:
    """A rank that is told what the others send."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.sent: list[Tensor] = []
        self.received: list[list[Tensor]] = []

    def exchange(self, x: Tensor, out: Tensor) -> None:
        self._give(x, out, lambda each: each.flatten())

    def swap(self, x: Tensor, out: Tensor) -> None:
        assert len(x) == self.size
        self._give(x, out, lambda each: each[self.rank].flatten())

    def _give(self, x: Tensor, out: Tensor, taken: Callable[[Tensor], Tensor]) -> None:
        assert x.is_contiguous() and out.is_contiguous()
        number = len(self.sent)
        self.sent.append(x.clone())
        if number < len(self.received):
            out.view(-1).copy_(torch.cat([taken(each) for each in self.received[number]]))


def on_ranks(size: int, call: Callable[[Turn], Tensor], num_exchanges: int = 1) -> list[Tensor]:
    """The result of each rank. All repeat the call until each knows what the others send."""
    turns = [Turn(rank, size) for rank in range(size)]
    for known in range(num_exchanges + 1):
        results = []
        for turn in turns:
            turn.sent.clear()
            launch.scratch.clear()
            results.append(call(turn))
            assert len(turn.sent) == num_exchanges
        for turn in turns:
            turn.received = [[each.sent[number] for each in turns] for number in range(min(known + 1, num_exchanges))]
    return results


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns(dtype: torch.dtype, order: Order) -> None:
    widths = (40, 1, 1100)
    parts = [randn(3, 1200, seed=rank, dtype=dtype)[:, : widths[rank]] for rank in range(3)]
    expected = torch.cat(parts, dim=1)
    with grid_order(order):
        for found in on_ranks(3, lambda turn: collectives.all_gather(parts[turn.rank], turn, widths)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_in_the_order_of_the_ranks(
    dtype: torch.dtype, is_large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_large:
        monkeypatch.setattr(collectives, "MOST_EXCHANGED", 0)
    parts = [randn(4, 1030, seed=rank, dtype=dtype) * 10**rank for rank in range(3)]
    expected = (parts[0].float() + parts[1].float() + parts[2].float()).to(dtype)
    for found in on_ranks(3, lambda turn: collectives.all_reduce(parts[turn.rank], turn), 1 + is_large):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_keep_their_bits(dtype: torch.dtype) -> None:
    owner = torch.tensor([1, 0, 0, 1])
    parts = [randn(4, 48, seed=rank, dtype=dtype) for rank in range(2)]
    expected = torch.stack([parts[rank][row] for row, rank in enumerate(owner.tolist())])
    for part in (*parts, expected):
        part[:, 0] = -0.0
    parts[0][0] = torch.nan  # nobody looks at it
    bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
    for found in on_ranks(2, lambda turn: collectives.select_rows(parts[turn.rank], turn, owner == turn.rank)):
        assert torch.equal(found.view(bits), expected.view(bits))


@pytest.mark.parametrize("ids", [[3, 0, 5, 4], [9] * 300])
def test_ids_of_a_shard(ids: Sequence[int]) -> None:
    given = torch.tensor(ids, dtype=torch.int32)
    expected = ops.shard_ids.reference(given, 3, 2)
    for ours, theirs in zip(collectives.shard_ids(given, 3, 2), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_meetings_in_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """From ids to logits, in which ranks meet in all ways; what surrounds the meetings is fused."""
    monkeypatch.setitem(dispatch._used, "cpu", op_set.TritonOps())
    table, inner, outer, head = (
        randn(*shape, seed=seed) for seed, shape in enumerate(((6, 32), (32, 32), (32, 32), (6, 32)))
    )
    ids, rows = torch.tensor([5, 0, 3], dtype=torch.int32), torch.arange(3)
    columns, widths = (slice(0, 16), slice(16, 32)), (4, 2)
    shards, words = (slice(0, 3), slice(3, 6)), (slice(0, 4), slice(4, 6))

    def run(turn: Turn) -> Tensor:
        own, size = turn.rank, Spec("tokens", 1, torch.int32)
        program = Program("cpu", max_tokens=3, max_samples=3)
        given: Any = program.input("input_ids", size)
        communicator: Any = turn
        local, is_here = ops.shard_ids(given, shards[own].start, 3)
        hidden = ops.select_rows(ops.embedding(local, table[shards[own]].contiguous()), communicator, is_here)
        middle = ops.linear(hidden, inner[columns[own]].contiguous())
        hidden = hidden + ops.all_reduce(ops.linear(middle, outer[:, columns[own]].contiguous()), communicator)
        normed = ops.rms_norm(hidden, torch.ones(32), 1e-5)
        logits = ops.linear(normed, head[words[own]].contiguous())
        program.finish(ops.all_gather(logits, communicator, widths))
        assert [node.name for node in program.runner._nodes].count("add_rms_norm") == 1  # type: ignore[union-attr]
        return program.replay({"input_ids": ids, "logits_rows": rows})[0].clone()

    hidden = table[ids.long()]
    hidden = hidden + hidden @ inner.t() @ outer.t()
    normed = torch.nn.functional.rms_norm(hidden, (32,), torch.ones(32), 1e-5)
    first, second = on_ranks(2, run, num_exchanges=3)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, normed @ head.t(), rtol=1e-4, atol=1e-4)
